"""The division of a weight into blocks, each of which is active or inactive as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE = (1, 1)
"""The block of a weight whose elements are active or inactive one by one."""


@dataclass(frozen=True)
class BlockGrid:
    """A weight, taken as the matrix ``[rows, columns]``, in blocks of V rows by U columns.

    Blocks are numbered along a row of blocks first, and a block's elements are stored as ``[U, V]``. Blocks of [1, 1] are the
    weight's elements in their own order.

    Attributes:
        shape: of the weight, ``[rows, ...]``; all dimensions after the first are columns.
        block: V and U.
    """

    shape: torch.Size
    block: tuple[int, int] = SINGLE

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def grid(self) -> torch.Size:
        """Blocks along the rows and along the columns. Of [1, 1] blocks, the weight's own shape."""
        if self.block == SINGLE:
            return self.shape
        (rows, columns), (height, width) = self.matrix, self.block
        return torch.Size([rows // height, columns // width])

    @property
    def block_numel(self) -> int:
        """Weights of a block."""
        return math.prod(self.block)

    @property
    def num_blocks(self) -> int:
        """Blocks of the weight, N."""
        return self.grid.numel()

    def fits(self) -> bool:
        """Returns whether the block divides the weight."""
        return len(self.shape) > 1 and all(size % part == 0 for size, part in zip(self.matrix, self.block, strict=True))

    def to_blocks(self, weight: Tensor) -> Tensor:
        """Returns a weight of ``shape`` as ``[N, U, V]``."""
        (rows, columns), (height, width) = self.matrix, self.block
        tiles = weight.reshape(rows // height, height, columns // width, width)
        return tiles.permute(0, 2, 3, 1).reshape(-1, width, height)

    def to_weight(self, blocks: Tensor) -> Tensor:
        """Returns ``[N, U, V]``, or as many elements of another shape, as a weight of ``shape``; contiguous."""
        (rows, columns), (height, width) = self.matrix, self.block
        tiles = blocks.reshape(rows // height, columns // width, width, height)
        return tiles.permute(0, 3, 1, 2).reshape(self.shape)

    def norms(self, weight: Tensor) -> Tensor:
        """Returns the L2 norm of each block of a weight, ``[N]``; of [1, 1] blocks the magnitudes, exactly."""
        return weight.abs().flatten() if self.block == SINGLE else self.to_blocks(weight).flatten(1).norm(dim=1)
