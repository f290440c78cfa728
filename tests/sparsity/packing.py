"""Packed layers and their dense masked twins, for the tests of both."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svite_scale.sparsity.block_grid import SINGLE
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.packing import BLOCK_TYPE, PACKED_TYPE
from tests import reference


@dataclass
class Twin:
    """A packed layer beside the dense module it came from, whose inactive weights are 0.

    Attributes:
        positions: int64 ``[k, ...]``, shaped like the values: where each is in the flat weight.
        recorded_positions: int64, flat: where each element of what the gradient hook gets is in the flat weight.
    """

    packed: PackedLayer
    dense: nn.Linear | nn.Conv2d
    positions: Tensor
    recorded_positions: Tensor

    def active_weights(self, dense: Tensor) -> Tensor:
        """Returns the active elements of a tensor like the dense weight, shaped like the values."""
        return dense.flatten()[self.positions]

    def masked(self, dense: Tensor) -> Tensor:
        """Returns a tensor like the dense weight with zeros where inactive."""
        masked = torch.zeros_like(dense).flatten()
        masked[self.positions] = self.active_weights(dense.detach())
        return masked.view(dense.shape)

    def recorded_weight(self, recorded: Tensor) -> Tensor:
        """Returns what the gradient hook got as a tensor like the dense weight."""
        dense = torch.empty(recorded.numel(), dtype=recorded.dtype)
        dense[self.recorded_positions] = recorded.flatten()
        return dense.view(self.dense.weight.shape)


def twin_of(dense: nn.Linear | nn.Conv2d, density: float = 0.4, seed: int = 0, block: tuple[int, int] = SINGLE) -> Twin:
    """Packs ``dense`` under a random mask of about ``density``."""
    positions = positions_of_units(dense.weight.shape, block)
    num_units = len(positions)
    num_active = max(1, int(density * num_units))
    chosen = torch.randperm(num_units, generator=torch.Generator().manual_seed(seed))[:num_active]
    active = torch.zeros(num_units, dtype=torch.bool)
    active[chosen] = True
    packed = (PACKED_TYPE if block == SINGLE else BLOCK_TYPE)[type(dense)]
    layer = packed(copy.deepcopy(dense), num_active, "layer", block)  # type: ignore[arg-type]
    layer.set_weight(dense.weight, active)
    with torch.no_grad():
        dense.weight.view(-1)[positions[~active].flatten()] = 0
    return Twin(layer, dense, positions[active].view_as(layer.values), positions.flatten())


def positions_of_units(shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Returns where each weight of each block is in the flat weight, int64 ``[N, U, V]``."""
    return torch.tensor(reference.unit_positions(shape, block)).view(-1, block[1], block[0])


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
BLOCKS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], tuple[int, int]]] = {
    "linear, tall blocks": (nn.Linear, {"in_features": 3, "out_features": 32}, (2, 2, 3), (16, 1)),
    "linear, tall blocks, no batch": (nn.Linear, {"in_features": 4, "out_features": 32, "bias": False}, (4,), (16, 2)),
    "linear, tall blocks, empty batch": (nn.Linear, {"in_features": 4, "out_features": 32}, (0, 4), (16, 2)),
    "linear, small blocks": (nn.Linear, {"in_features": 8, "out_features": 6}, (2, 3, 8), (2, 4)),
    "conv, tall blocks": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 32, "kernel_size": (2, 1), "stride": (2, 1)},
        (1, 2, 5, 2),
        (16, 2),
    ),
    "conv, small blocks, one image": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 4, "kernel_size": 2, "stride": 2, "bias": False},
        (2, 4, 6),
        (4, 1),
    ),
}
"""In blocks that a CPU has fast products for, in fp32, and in smaller ones."""
CASES = {
    **{f"linear, {name}": (nn.Linear, *case, SINGLE) for name, case in LINEARS.items()},
    **{f"conv, {name}": (nn.Conv2d, *case, SINGLE) for name, case in CONVOLUTIONS.items()},
    **BLOCKS,
}


def case_of(name: str) -> tuple[Twin, Tensor]:
    """A twin in float64 and an input for it."""
    kind, options, shape, block = CASES[name]
    torch.manual_seed(len(name))
    return twin_of(kind(**options, dtype=torch.float64), block=block), torch.randn(shape, dtype=torch.float64)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Returns the packed layers of a model, by their names in it, in order of registration."""
    return {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, PackedLayer)}
