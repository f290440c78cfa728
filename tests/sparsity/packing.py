"""Packed layers and their dense masked twins, for the tests of both."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.packed import PackedConv2d, PackedLayer, PackedLinear


@dataclass
class Twin:
    """A packed layer beside the dense module it came from, whose inactive weights are 0.

    Attributes:
        active: bool, shaped like the weight.
    """

    packed: PackedLayer
    dense: nn.Linear | nn.Conv2d
    active: Tensor


def twin_of(dense: nn.Linear | nn.Conv2d, density: float = 0.4, seed: int = 0) -> Twin:
    """Packs ``dense`` under a random mask of about ``density``."""
    numel = dense.weight.numel()
    num_active = max(1, int(density * numel))
    chosen = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:num_active]
    active = torch.zeros(numel, dtype=torch.bool)
    active[chosen] = True
    packed = PackedLinear if isinstance(dense, nn.Linear) else PackedConv2d
    layer: PackedLayer = packed(copy.deepcopy(dense), num_active, "layer")  # type: ignore[arg-type]
    layer.set_weight(dense.weight, active)
    with torch.no_grad():
        dense.weight.mul_(active.view_as(dense.weight))
    return Twin(layer, dense, active.view_as(dense.weight))


LINEARS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tokens": ({"in_features": 7, "out_features": 5}, (2, 3, 7)),
    "no bias": ({"in_features": 7, "out_features": 5, "bias": False}, (4, 7)),
    "one row": ({"in_features": 3, "out_features": 1}, (6, 3)),
    "no batch": ({"in_features": 5, "out_features": 4}, (5,)),
    "empty batch": ({"in_features": 5, "out_features": 4}, (0, 5)),
}
CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "patches": ({"in_channels": 3, "out_channels": 5, "kernel_size": 4, "stride": 4}, (2, 3, 8, 8)),
    "no bias": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "bias": False}, (2, 2, 5, 6)),
    "stride that leaves a rest": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "stride": (2, 3)}, (1, 2, 8, 9)),
    "padding": ({"in_channels": 2, "out_channels": 3, "kernel_size": (3, 2), "padding": (2, 1)}, (2, 2, 4, 5)),
    "dilation": ({"in_channels": 1, "out_channels": 2, "kernel_size": 3, "dilation": (2, 1)}, (2, 1, 7, 6)),
    "groups": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 1}, (2, 4, 5, 5)),
    "depthwise": (
        {"in_channels": 3, "out_channels": 3, "kernel_size": 3, "groups": 3, "stride": 2, "padding": 1},
        (2, 3, 7, 7),
    ),
    "same": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "same"}, (2, 2, 5, 6)),
    "same, even and dilated": (
        {"in_channels": 2, "out_channels": 3, "kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
        (2, 2, 6, 5),
    ),
    "valid": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "valid", "stride": 2}, (2, 2, 5, 6)),
    "reflect": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (2, 2, 5, 4)),
    "circular, same": (
        {"in_channels": 2, "out_channels": 2, "kernel_size": 2, "padding": "same", "padding_mode": "circular"},
        (1, 2, 4, 5),
    ),
    "replicate": (
        {"in_channels": 1, "out_channels": 2, "kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
        (2, 1, 4, 5),
    ),
    "one image": ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1}, (3, 5, 6)),
    "one image, same": ({"in_channels": 3, "out_channels": 4, "kernel_size": 2, "padding": "same"}, (3, 5, 6)),
}
CASES = {
    **{f"linear, {name}": (nn.Linear, *case) for name, case in LINEARS.items()},
    **{f"conv, {name}": (nn.Conv2d, *case) for name, case in CONVOLUTIONS.items()},
}


def case_of(name: str) -> tuple[Twin, Tensor]:
    """A twin in float64 and an input for it."""
    kind, options, shape = CASES[name]
    torch.manual_seed(len(name))
    return twin_of(kind(**options, dtype=torch.float64)), torch.randn(shape, dtype=torch.float64)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Returns the packed layers of a model, by their names in it, in order of registration."""
    return {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, PackedLayer)}
