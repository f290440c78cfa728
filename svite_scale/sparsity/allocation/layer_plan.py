"""Plan of the active weights: how many of each layer, from a global density, explicit densities, or a file of masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from svite_scale.errors import SparsifyError
from svite_scale.sparsity.allocation.distributions import DISTRIBUTIONS, counts, erk
from svite_scale.sparsity.allocation.first_masks import FirstMasks
from svite_scale.sparsity.allocation.layer_patterns import densities_by_pattern, matching_layers
from svite_scale.sparsity.block_grid import SINGLE, BlockGrid
from svite_scale.sparsity.options import FROM_WEIGHTS, Allocation


@dataclass(frozen=True)
class LayerPlan:
    """One layer: where it is, its weight's shape, and how many of its weights are active.

    Attributes:
        name: of the module.
        shape: of its weight.
        num_active: active weights.
        block: rows and columns of the blocks that they come in.
        raised: its part of the density is below one block, and it has one all the same.
        kept_dense: it isn't made sparse on request, and doesn't count in the density.
        in_units: it is smaller by whole heads or neurons.
    """

    name: str
    shape: torch.Size
    num_active: int
    block: tuple[int, int] = SINGLE
    raised: bool = False
    kept_dense: bool = False
    in_units: bool = False

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(self.shape, self.block)

    @property
    def density(self) -> float:
        return self.num_active / self.numel

    @property
    def is_packed(self) -> bool:
        """True if it becomes a packed layer. If all its weights are active, it stays an ordinary dense module."""
        return self.num_active < self.numel and not self.in_units


def plan_layers(
    grids: Mapping[str, BlockGrid],
    allocation: Allocation,
    packed_otherwise: Collection[str] = (),
    masks: FirstMasks | None = None,
) -> list[LayerPlan]:
    """Returns the exact count of active weights of each layer.

    Args:
        grids: of the weight of each layer that may be made sparse.
        allocation: says where the active weights are.
        packed_otherwise: names of layers that aren't among them, which ``keep_dense`` may match all the same.
        masks: the first masks, where they say how many weights are active; None where a density does.

    Returns:
        One entry per layer, in the order of ``grids``.

    Raises:
        SparsifyError: patterns, masks or budget don't fit the layers.
    """
    kept = matching_layers([*grids, *packed_otherwise], allocation.keep_dense) & grids.keys()
    sparse = {name: grid for name, grid in grids.items() if name not in kept}
    if not sparse:
        raise SparsifyError(
            "keep_dense", list(allocation.keep_dense), "keeps every layer dense", "let it leave out at least one"
        )
    num_active, raised = (masks.counts(sparse), set()) if masks else _counts(sparse, allocation)
    num_blocks = {name: grid.num_blocks for name, grid in grids.items()}
    if allocation.masks == FROM_WEIGHTS and not packed_otherwise and num_active == {name: num_blocks[name] for name in sparse}:
        what = "weight" if allocation.block == SINGLE else f"block of {list(allocation.block)}"
        problem = f"no {what} is 0, so this model isn't pruned"
        raise SparsifyError("masks", FROM_WEIGHTS, problem, "give a density, or the weights of a pruned model")
    num_active |= {name: num_blocks[name] for name in kept}
    return [
        LayerPlan(name, grid.shape, num_active[name] * grid.block_numel, grid.block, name in raised, name in kept)
        for name, grid in grids.items()
    ]


def plan_density(plan: Sequence[LayerPlan]) -> float:
    """Returns the active fraction of the weights that may be inactive: those of all layers but the ones kept dense."""
    sparse = [layer for layer in plan if not layer.kept_dense]
    return sum(layer.num_active for layer in sparse) / sum(layer.numel for layer in sparse)


def _counts(grids: Mapping[str, BlockGrid], allocation: Allocation) -> tuple[dict[str, int], set[str]]:
    """Returns the active blocks of each layer by its density, and the layers whose part of it is below one block."""
    densities = layer_densities({name: grid.shape for name, grid in grids.items()}, allocation)
    num_active: dict[str, int] = {}
    for block in {grid.block: None for grid in grids.values()}:  # each size of block has a budget of its own
        shapes = {name: grid.grid for name, grid in grids.items() if grid.block == block}
        unit, smaller = ("weights", "") if block == SINGLE else (f"blocks of {list(block)}", "choose a smaller block, ")
        try:
            num_active |= counts(shapes, densities, unit)
        except ValueError as error:
            field = "densities" if allocation.densities else "density"
            remedy = f"raise it, {smaller}or list small layers in keep_dense"
            raise SparsifyError(field, getattr(allocation, field), str(error), remedy) from error
    return num_active, {name for name, grid in grids.items() if densities[name] * grid.num_blocks < 1}


def layer_densities(shapes: Mapping[str, torch.Size], allocation: Allocation) -> dict[str, float]:
    """Returns the density of each layer, where no file of masks says it.

    Raises:
        SparsifyError: patterns don't fit the layers.
    """
    if allocation.densities:
        return densities_by_pattern(shapes, allocation.densities)
    if allocation.distribution == "erk":
        return erk(shapes, allocation.density, power_scale=allocation.power_scale)
    return DISTRIBUTIONS[allocation.distribution](shapes, allocation.density)
