"""Making a VisionTransformer's heads and neurons sparse."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from svite_scale.errors import OptionError
from svite_scale.models.options import StructuredConfig
from svite_scale.models.packed_attention import QKV, PackedAttention
from svite_scale.models.packed_mlp import PackedMlp
from svite_scale.models.token_insertion import require_vision_transformer
from svite_scale.models.token_selector import TokenSelector
from svite_scale.sparsity.allocation.layer_plan import LayerPlan
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.layers.plain_layer import changed_call, lost_in_packing
from svite_scale.sparsity.options import Allocation
from svite_scale.sparsity.packing import largest, random_mask, refuse_shared, replace_module

PARTS = {"heads": "attn", "neurons": "mlp"}
"""The submodule of a block that holds the units, by their kind."""

DROPOUTS = {"heads": ("attn_drop", "proj_drop"), "neurons": ("drop1", "drop2")}
"""The dropouts of that submodule."""


def pack_units(
    model: nn.Module,
    *,
    heads: float = StructuredConfig.heads,
    neurons: float = StructuredConfig.neurons,
    grow: str = StructuredConfig.grow,
    init: str = Allocation.init,
    seed: int = 0,
    by_magnitude: bool = False,
) -> list[LayerPlan]:
    """Packs the heads and neurons of each block of a VisionTransformer, in place: all blocks, or none on an error.

    Call it before any engine wraps the model, on every rank with the same arguments: the active units then agree without
    communication, since they are a function of (seed, layer name), or of the weights. Absent units have no weights and no
    biases. Active units keep their values, those of outgoing weights times a factor that ``init`` chooses. ``sparsify`` and
    ``insert_token_selectors`` may come before it or after it.

    Args:
        model: timm's VisionTransformer; on the meta device only shapes are planned and packed.
        heads: fraction of each block's heads that is active, in (0, 1]: ``int(heads * number of heads)`` of them.
        neurons: the same of the hidden neurons of each block's MLP.
        grow: score of an absent unit: ``candidate`` tries one with weights of its own; ``paper`` is the reference's.
        init: ``fan_in`` multiplies the outgoing weights of units (``proj`` and ``fc2``) by the root of all units over active
            ones, so that the layer's outputs keep their spread. ``dense`` keeps the values, for a model that is trained
            already. So does ``by_magnitude``, whatever ``init`` is.
        seed: of the first active units, if they are drawn, and of candidates.
        by_magnitude: the units of largest :func:`magnitudes` are active at first, for a model that is trained already; units
            that are pruned already, whose weights are 0, come last. False draws them.

    Returns:
        One entry per weight that became smaller, named as in the dense model; empty if ``heads`` and ``neurons`` are 1.

    Raises:
        OptionError: a value is out of range, the model is no VisionTransformer of timm, or a layer can't be packed, or would
            keep no unit; it is a ValueError too.
        TopologyError: an engine has wrapped the model already, or a weight is shared.
    """
    options = StructuredConfig(heads=heads, neurons=neurons, grow=grow)  # type: ignore[arg-type]
    by_fan_in = Allocation(init=init).init == "fan_in" and not by_magnitude  # type: ignore[arg-type]
    densities = {field: getattr(options, field) for field in PARTS if getattr(options, field) < 1.0}
    chosen: list[tuple[str, str, Any, Tensor]] = []
    for field, density in densities.items():
        require_vision_transformer(model, field, density)
    blocks = [block for block in cast(Any, model).blocks if not isinstance(block, TokenSelector)] if densities else []
    for index, block in enumerate(blocks):
        for field, density in densities.items():
            dense, name = getattr(block, PARTS[field], None), f"blocks.{index}.{PARTS[field]}"
            num_units = check_packable(field, density, dense, name)
            num_active = count_active(field, density, num_units)
            if by_magnitude and not _moving(dense)[0].is_meta:
                active = largest(magnitudes(cast(Any, dense)), num_active).cpu()
            else:
                with torch.device("cpu"):  # even if the model is on the meta device
                    active = random_mask(num_units, num_active, seed, f"{name}.{field}")
            chosen.append((field, name, dense, active))
    plan = [entry for _, name, dense, active in chosen for entry in _plan(name, dense, active)]
    refuse_shared(model, {entry.name for entry in plan})
    # Nothing can fail any more, and nothing was changed yet.
    for field, name, dense, active in chosen:
        packed_type = PackedAttention if field == "heads" else PackedMlp
        layer = packed_type(dense, active, f"{name}.{field}", seed=seed, grow=options.grow)
        if by_fan_in:
            layer.scale_by_fan_in()
        replace_module(model, name, layer)
    return plan


def magnitudes(dense: Attention | Mlp) -> Tensor:
    """Returns the magnitude of each head or neuron, fp32 ``[units]``: the L1 norm of the weights that lead to it (queries, keys
    and values, or its row of ``fc1``) and from it. It is 0 where no weight leads to the unit.
    """
    first, last = (getattr(dense, child).weight.detach().float() for child in _children(dense))
    repeats, num_units = (QKV, dense.num_heads) if isinstance(dense, Attention) else (1, first.shape[0])
    incoming = first.unflatten(0, (repeats, num_units, -1)).abs().sum(dim=(0, 2, 3))
    outgoing = last.unflatten(1, (num_units, -1)).abs().sum(dim=(0, 2))
    return (incoming + outgoing) * (incoming != 0)


def count_active(field: str, density: float, num_units: int) -> int:
    """Returns ``int(num_units * density)``, as the paper's code has it.

    Raises:
        OptionError: that is 0.
    """
    active = int(num_units * density)
    if not active:
        raise OptionError(field, density, f"keeps none of {num_units} {field}", "raise it")
    return active


def check_packable(field: str, density: float, module: Any, name: str) -> int:
    """Checks that the heads or neurons of a module can be packed, and returns their number.

    Raises:
        OptionError: they can't, or the module holds packed weights.
    """
    problem = None
    if module is None:
        problem = "isn't there: these blocks have no such part of their own"
    elif any(isinstance(child, PackedLayer) for child in module.children()):
        problem = "holds layers packed by weights, and a weight is packed in one way only"
    elif field == "heads":
        if type(module) is not Attention or module.gate is not None or type(module.norm) is not nn.Identity:
            problem = "is no plain attention: it has a gate, a norm before its projection, or a class of its own"
    else:
        if type(module) is not Mlp or type(module.fc1) is not nn.Linear or type(module.norm) is not nn.Identity:
            problem = "is no plain MLP: it has gated or convolutional layers, a norm, or a class of its own"
    if problem is None:
        problem = _lost(module)
    if problem is None and not all(parameter.requires_grad for parameter in _moving(module)):
        problem = "has frozen weights, and those of units are trained"
    if problem is None and any(getattr(module, dropout).p for dropout in DROPOUTS[field]):
        problem = f"has dropout ({' or '.join(DROPOUTS[field])}), which the scores of units know nothing of"
    if problem is not None:
        raise OptionError(field, density, f"can't pack {name}, which {problem}", "leave it at 1.0")
    return module.num_heads if field == "heads" else module.fc1.out_features


def _lost(module: nn.Module) -> str | None:
    """Returns what the packed module would not do; None if nothing is lost."""
    losses = {"": changed_call(module)} | {child: lost_in_packing(getattr(module, child)) for child in _children(module)}
    lost = [f"{child} {loss.problem}".lstrip() for child, loss in losses.items() if loss is not None]
    return f"would lose what was done to it ({', '.join(lost)})" if lost else None


def _moving(dense: Attention | Mlp) -> list[nn.Parameter]:
    """Returns the parameters that hold a part of each unit."""
    first, last = (getattr(dense, child) for child in _children(dense))
    return [parameter for parameter in (first.weight, first.bias, last.weight) if parameter is not None]


def _children(dense: nn.Module) -> tuple[str, str]:
    """Returns the names of the layer whose rows belong to units, and of the one whose columns do."""
    return ("qkv", "proj") if isinstance(dense, Attention) else ("fc1", "fc2")


def _plan(name: str, dense: nn.Module, active: Tensor) -> list[LayerPlan]:
    """Returns the plan of each weight of a layer."""
    num_units, num_active = active.numel(), int(active.count_nonzero())
    plan = []
    for child in _children(dense):
        weight: Tensor = getattr(dense, child).weight
        plan.append(LayerPlan(f"{name}.{child}", weight.shape, weight.numel() // num_units * num_active, in_units=True))
    return plan
