"""Which weights have ever been active, and which have been since the start, in one bit per weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.sharding import rank_and_size, rank_chunk


class HistoryCounts(NamedTuple):
    """Weights of one layer.

    Attributes:
        ever_active: that have been active at any time.
        initial_survivors: that have been active all the time.
    """

    ever_active: int
    initial_survivors: int


class History:
    """One bit per weight of every packed layer, each rank keeping its chunk: of an active weight, whether it has been active
    since the start; of an inactive one, whether it has ever been active.

    Attributes:
        chunks: by layer name, this rank's chunk of the layer's uint8 ``[ceil(N / 8)]``.

    Source: Liu et al., "Do We Actually Need Dense Over-Parameterization?" (arXiv:2102.02887), whose over-parameterization rate
    R_s is the share that has ever been active.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """``group`` is the data-parallel ranks, None without ``torch.distributed``."""
        self.group = group
        self.rank, self.world_size = rank_and_size(group)
        self.chunks: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def begin(self, layer: SparseLayer, mask: Tensor) -> None:
        """Training begins with this mask of a layer, uint8 ``[ceil(N / 8)]``; local."""
        self.chunks[layer.name] = rank_chunk(mask, self.rank, self.world_size).clone()

    def follow(self, layer: SparseLayer, old_mask: Tensor, new_mask: Tensor) -> None:
        """A layer's mask changes from one to the other, each uint8 ``[ceil(N / 8)]``; local."""
        old, new = (rank_chunk(mask, self.rank, self.world_size) for mask in (old_mask, new_mask))
        marked = self.chunks[layer.name]
        self.chunks[layer.name] = marked = (new & old & marked) | (~new & (old | marked))
        self._counts[layer.name] = torch.stack([_count(new | marked), _count(new & marked)])

    def counts(self) -> dict[str, HistoryCounts]:
        """Of each layer that has followed a change, after it. A collective."""
        counts = torch.stack(list(self._counts.values()))
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return {name: HistoryCounts(*row) for name, row in zip(self._counts, counts.tolist(), strict=True)}


def _count(marks: Tensor) -> Tensor:
    """Bits set, as an int64 scalar."""
    return bits.unpack(marks, marks.numel() * 8).count_nonzero()
