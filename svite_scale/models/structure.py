"""Making a VisionTransformer's heads and neurons sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from svite_scale.errors import ConfigError
from svite_scale.models.options import StructuredConfig
from svite_scale.models.packed_attention import PackedAttention
from svite_scale.models.packed_mlp import PackedMlp
from svite_scale.models.token_selector import TokenSelector, refuse_other_models
from svite_scale.sparsity.allocation.layer_plan import LayerPlan
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.layers.plain_layer import changed_call, lost_in_packing
from svite_scale.sparsity.packing import random_mask, refuse_shared, replace_module

PARTS = {"heads": "attn", "neurons": "mlp"}
"""By what is made sparse, the submodule of a block that holds it."""

DROPOUTS = {"heads": ("attn_drop", "proj_drop"), "neurons": ("drop1", "drop2")}
"""The dropouts in it."""


def pack_units(model: nn.Module, structured: StructuredConfig, seed: int) -> list[LayerPlan]:
    """Replaces each block's attention and MLP by packed ones, in place, where fewer than all their units are active: all of
    them, or none on an error. The model may have token selectors already, or get them later.

    ``int(density * units)`` units of each layer are active, drawn from (seed, layer name), the same on every rank.

    Returns:
        One entry per weight that became smaller, named as in the dense model.

    Raises:
        ConfigError: the model is no VisionTransformer of timm, or a layer can't be
            packed, or would keep no unit.
        TopologyError: a weight is shared.
    """
    densities = {field: getattr(structured, field) for field in PARTS if getattr(structured, field) < 1.0}
    chosen: list[tuple[str, str, Any, Tensor]] = []
    for index, block in enumerate(_blocks(model, densities)):
        for field, density in densities.items():
            dense, name = getattr(block, PARTS[field], None), f"blocks.{index}.{PARTS[field]}"
            num_units = check_packable(field, density, dense, name)
            active = _initial(num_units, count_active(field, density, num_units), seed, f"{name}.{field}")
            chosen.append((field, name, dense, active))
    plan = [entry for _, name, dense, active in chosen for entry in _plan(name, dense, active)]
    refuse_shared(model, {entry.name for entry in plan})
    # Nothing can fail any more, and nothing was changed yet.
    for field, name, dense, active in chosen:
        packed_type = PackedAttention if field == "heads" else PackedMlp
        replace_module(model, name, packed_type(dense, active, f"{name}.{field}", seed=seed, grow=structured.grow))
    return plan


def _blocks(model: nn.Module, densities: Mapping[str, float]) -> list[nn.Module]:
    """The transformer blocks, in which something is to be packed; none where nothing is."""
    for field, density in densities.items():
        refuse_other_models(model, f"sparsity.structured.{field}", density)
    return [block for block in cast(Any, model).blocks if not isinstance(block, TokenSelector)] if densities else []


def count_active(field: str, density: float, num_units: int) -> int:
    """``int(num_units * density)``, as the paper's code has it."""
    active = int(num_units * density)
    if not active:
        raise ConfigError(f"sparsity.structured.{field}", density, f"keeps none of {num_units} {field}", "raise it")
    return active


def check_packable(field: str, density: float, module: Any, name: str) -> int:
    """How many units there are.

    Raises:
        ConfigError: the module isn't one that can be packed, or holds packed weights.
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
        raise ConfigError(f"sparsity.structured.{field}", density, f"can't pack {name}, which {problem}", "leave it at 1.0")
    return module.num_heads if field == "heads" else module.fc1.out_features


def _initial(num_units: int, num_active: int, seed: int, name: str) -> Tensor:
    """Bool ``[units]``, on the CPU though the model be on meta."""
    with torch.device("cpu"):
        return random_mask(num_units, num_active, seed, name)


def _lost(module: nn.Module) -> str | None:
    """What the packed module wouldn't do."""
    losses = {"": changed_call(module)} | {child: lost_in_packing(getattr(module, child)) for child in _children(module)}
    lost = [f"{child} {loss.problem}".lstrip() for child, loss in losses.items() if loss is not None]
    return f"would lose what was done to it ({', '.join(lost)})" if lost else None


def _moving(dense: Attention | Mlp) -> list[nn.Parameter]:
    """What will follow the units."""
    first, last = (getattr(dense, child) for child in _children(dense))
    return [parameter for parameter in (first.weight, first.bias, last.weight) if parameter is not None]


def _children(dense: nn.Module) -> tuple[str, str]:
    """The layer whose rows belong to units, and the one whose columns do."""
    return ("qkv", "proj") if isinstance(dense, Attention) else ("fc1", "fc2")


def _plan(name: str, dense: nn.Module, active: Tensor) -> list[LayerPlan]:
    """What is left of each weight of a layer."""
    num_units, num_active = active.numel(), int(active.count_nonzero())
    plan = []
    for child in _children(dense):
        weight: Tensor = getattr(dense, child).weight
        plan.append(LayerPlan(f"{name}.{child}", weight.shape, weight.numel() // num_units * num_active, in_units=True))
    return plan
