"""Whether a dense layer is just that: all that it does is what its class, its weight and its bias say.

A packed layer takes these on. What else was done to the dense one (hooks, a reparametrization, another forward) would be lost.
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
"""Where torch keeps the hooks of a module; there is no public way to ask for them."""

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Where it keeps those of a tensor."""

PLAIN: dict[type[nn.Module], nn.Module] = {
    nn.Linear: nn.Linear(1, 1, device="meta"),
    nn.Conv2d: nn.Conv2d(1, 1, 1, device="meta"),
}
"""Layers to which nothing was done."""


class Loss(NamedTuple):
    """What packing a layer would lose, and what helps."""

    problem: str
    remedy: str


def refuse_wrapped(model: nn.Module) -> None:
    """Refuses a model that an engine has wrapped, or whose weights aren't whole on this rank.

    Raises:
        TopologyError: names the engine, or a weight.
    """
    remedy = "make the model sparse first, whole on each rank or on the meta device, and wrap it after that"
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
    """The class of a module, before it was parametrized."""
    return parametrize.type_before_parametrizations(module)


def own_attributes(module: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """What was set on a module that a plain one of its class doesn't have."""
    return {name: value for name, value in vars(module).items() if name not in vars(plain)}


def lost_in_packing(layer: nn.Module) -> Loss | None:
    """What a packed layer in the place of a Linear or Conv2d wouldn't do; None where there is nothing."""
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
    """What was done to a module's call or to its state dict; None where there is nothing."""
    if "_compiled_call_impl" in vars(module):
        return Loss("is compiled by itself", "compile it after sparsify()")
    if "forward" in vars(module):
        return Loss("has another forward than its class", "set that after sparsify()")
    kinds = [kind for name, kind in HOOKS.items() if any(not _is_left_behind(hook) for hook in getattr(module, name).values())]
    return Loss(f"has {' and '.join(kinds)}", "register them after sparsify()") if kinds else None


def _is_left_behind(hook: object) -> bool:
    """Whether it is a hook for old checkpoints that weight_norm or spectral_norm registered, and that taking them off left."""
    return getattr(hook, "__module__", "").startswith("torch.nn.utils.")
