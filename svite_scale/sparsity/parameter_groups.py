"""The parameter groups of a torch optimizer: what weight decay applies to, and what it doesn't."""

from __future__ import annotations

from typing import Any

from torch import nn

from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.module_names import unwrapped


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns a model's trainable parameters in groups with and without weight decay, as torch optimizers take them.

    Matrices and convolutions decay, and so do packed ``values``: they are 1-D, but the weights of a matrix. Biases and norms
    don't, nor what the model names in ``no_weight_decay()`` (timm's do: position embeddings, class token). Local.

    Args:
        model: after ``sparsify``; for FSDP2 after ``fully_shard`` too, which replaces the parameters.
        weight_decay: of the first group.

    Returns:
        Two groups, ``{"params": [...], "weight_decay": ...}``, without an empty one.
    """
    model = unwrapped(model)
    packed = {id(module.values) for module in model.modules() if isinstance(module, PackedLayer)}
    names_exempt: Any = getattr(model, "no_weight_decay", set)
    exempt = set(names_exempt())
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = id(parameter) in packed or (parameter.dim() > 1 and name not in exempt)
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
