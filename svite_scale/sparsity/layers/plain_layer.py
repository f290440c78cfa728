"""Checks that a dense layer is plain: that its class, its weight and its bias say all that it does.

A packed layer has all of these. Anything else of the dense layer (hooks, a reparametrization, another forward) would be lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from svite_scale.errors import TopologyError
from svite_scale.sparsity.module_names import is_engine

HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_pre_hooks": "state_dict pre-hooks",
    "_state_dict_hooks": "state_dict hooks",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hooks",
    "_load_state_dict_post_hooks": "load_state_dict post-hooks",
}
"""Attributes in which torch keeps the hooks of a module; there is no public way to ask for them."""

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes in which it keeps those of a tensor."""

PLAIN: dict[type[nn.Module], nn.Module] = {
    nn.Linear: nn.Linear(1, 1, device="meta"),
    nn.Conv2d: nn.Conv2d(1, 1, 1, device="meta"),
}
"""Layers as their classes make them."""


class Loss(NamedTuple):
    """A property of a layer that packing would lose, and the remedy."""

    problem: str
    remedy: str


SPARSE_FIRST = "make the model sparse first, whole on each rank or on the meta device, and wrap it after that"


def refuse_wrapped(model: nn.Module, remedy: str = SPARSE_FIRST) -> None:
    """Refuses a model that an engine has wrapped, or whose weights aren't whole on this rank.

    Raises:
        TopologyError: names the engine, or a weight.
    """
    for module in model.modules():
        if is_engine(module):
            raise TopologyError(f"a {type(module).__name__} has wrapped the model already; {remedy}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise TopologyError(f"{name} is sharded already, as {parameter.placements}; {remedy}")
        if hasattr(parameter, "ds_shape"):
            shape = tuple(parameter.ds_shape)
            raise TopologyError(f"{name}, of shape {shape}, is partitioned already, by deepspeed.zero.Init; {remedy}")
        if hasattr(parameter, "_hp_mapping"):
            raise TopologyError(f"{name} is stepped by a DeepSpeed engine already; {remedy}")


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module, before it was parametrized."""
    return parametrize.type_before_parametrizations(module)


def own_attributes(module: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that a plain one of its class doesn't have."""
    return {name: value for name, value in vars(module).items() if name not in vars(plain)}


def lost_in_packing(layer: nn.Module) -> Loss | None:
    """Returns what packing a Linear or Conv2d would lose; None if nothing."""
    if parametrize.is_parametrized(layer):
        return Loss("is parametrized", "call torch.nn.utils.parametrize.remove_parametrizations() first")
    tensors = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    own = [name for name in (*tensors, *dict(layer.named_children())) if name not in ("weight", "bias")]
    if "weight" not in tensors or (layer.bias is not None and "bias" not in tensors):
        return Loss(
            f"computes its weight or bias from {' and '.join(own) or 'elsewhere'}",
            "call remove_weight_norm(), remove_spectral_norm() or prune.remove() of torch.nn.utils first",
        )
    if own:
        return Loss(f"holds {' and '.join(own)} too", "let its parent hold that")
    hooked = [kind for kind in TENSOR_HOOKS if getattr(layer.weight, kind)]
    if hooked:
        return Loss("has hooks on its weight", "register them on the packed layer's values after sparsify()")
    return changed_call(layer)


def changed_call(module: nn.Module) -> Loss | None:
    """Returns how a module's call or state dict was changed; None if they weren't."""
    if "_compiled_call_impl" in vars(module):
        return Loss("is compiled by itself", "compile it after sparsify()")
    if "forward" in vars(module):
        return Loss("has another forward than its class", "set that after sparsify()")
    kinds = [kind for name, kind in HOOKS.items() if any(not _is_left_behind(hook) for hook in getattr(module, name).values())]
    return Loss(f"has {' and '.join(kinds)}", "register them after sparsify()") if kinds else None


def _is_left_behind(hook: object) -> bool:
    """Returns whether a hook is one for old checkpoints that weight_norm or spectral_norm leave when they are removed."""
    return getattr(hook, "__module__", "").startswith("torch.nn.utils.")
