"""First masks of layers that aren't drawn: from a file, from the zeros of weights, or of a checkpoint's counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from svite_scale.errors import SparsifyError
from svite_scale.sparsity.block_grid import BlockGrid
from svite_scale.sparsity.options import FROM_WEIGHTS


class FirstMasks(Protocol):
    """The first masks of some layers. :class:`~svite_scale.sparsity.allocation.mask_file.MaskFile` is one too."""

    def counts(self, grids: Mapping[str, BlockGrid]) -> dict[str, int]:
        """Returns the number of active blocks of each layer, given the grids of their weights.

        Raises:
            SparsifyError: the masks don't fit the layers.
        """
        ...

    def read(self, name: str, grid: BlockGrid) -> Tensor:
        """Returns a layer's mask, bool ``[N]``, given its name and the grid of its weight, N blocks."""
        ...


class NonzeroWeights:
    """Masks of weights that are pruned already: blocks that are 0 are inactive."""

    def __init__(self, active: Callable[[str, torch.Size], Tensor]) -> None:
        """``active`` returns which weights of a layer aren't 0, bool, one for each, given its name and its weight's shape."""
        self._active = active

    def counts(self, grids: Mapping[str, BlockGrid]) -> dict[str, int]:
        return {name: int(self.read(name, grid).sum()) for name, grid in grids.items()}

    def read(self, name: str, grid: BlockGrid) -> Tensor:
        active = self._active(name, grid.shape)
        if active.is_meta:
            problem = f"the weight of {name} is on the meta device, where no zeros can be found"
            raise SparsifyError("masks", FROM_WEIGHTS, problem, "load the weights first")
        if not active.any():
            problem = f"all weights of {name} are 0, and no layer can be empty"
            raise SparsifyError("masks", FROM_WEIGHTS, problem, f"list {name} in keep_dense")
        return grid.to_blocks(active).flatten(1).any(dim=1)


class SavedCounts:
    """Masks of as many active weights as a checkpoint has. The checkpoint replaces them, so any positions serve."""

    def __init__(self, num_active: Mapping[str, int]) -> None:
        """``num_active`` has the active weights of each packed layer of the checkpoint; the others are dense."""
        self._num_active = num_active

    def counts(self, grids: Mapping[str, BlockGrid]) -> dict[str, int]:
        weights = {name: self._num_active.get(name, grid.shape.numel()) for name, grid in grids.items()}
        for name, grid in grids.items():
            if weights[name] % grid.block_numel:
                problem = f"{name} has {weights[name]} active weights in the checkpoint, which are no whole blocks"
                raise SparsifyError("block", list(grid.block), problem, "resume with the block that the run was started with")
        return {name: weights[name] // grid.block_numel for name, grid in grids.items()}

    def read(self, name: str, grid: BlockGrid) -> Tensor:
        return torch.arange(grid.num_blocks) < self._num_active[name] // grid.block_numel
