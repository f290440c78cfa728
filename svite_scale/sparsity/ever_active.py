"""Which weights have ever been active: the in-time over-parameterization that dynamic sparse training lives from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.layers import PackedLayer


class EverActive:
    """One bit per weight of every packed layer, each rank keeping its chunk.

    Attributes:
        chunks: by layer name, this rank's chunk of the layer's uint8 ``[ceil(N / 8)]``, cut as :meth:`torch.Tensor.chunk` does
            (empty where there are fewer bytes than ranks).

    Source: Liu et al., "Do We Actually Need Dense Over-Parameterization?" (arXiv:2102.02887), the over-parameterization rate
    R_s.
    """

    def __init__(self, layers: Iterable[PackedLayer], group: dist.ProcessGroup | None) -> None:
        """Starts with no weight marked. ``group`` is the data-parallel ranks, None without ``torch.distributed``."""
        self.layers = list(layers)
        self.group = group
        self.rank, self.world_size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.chunks: dict[str, Tensor] = {}

    def mark(self, layer: PackedLayer, mask: Tensor) -> None:
        """Marks the weights active in ``mask``, the layer's full packed mask; local."""
        chunk = rank_chunk(mask, self.rank, self.world_size)
        self.chunks[layer.name] = chunk | self.chunks[layer.name] if layer.name in self.chunks else chunk.clone()

    def fraction(self) -> float:
        """Share of all packed weights that have ever been active. A collective."""
        marked = sum(int(bits.unpack(chunk, chunk.numel() * 8).sum()) for chunk in self.chunks.values())
        if self.group is not None:
            device = next(iter(self.chunks.values())).device
            total = torch.tensor([marked], dtype=torch.int64, device=device)
            dist.all_reduce(total, group=self.group)
            marked = int(total)
        return marked / sum(layer.shape.numel() for layer in self.layers)


def rank_chunk(full: Tensor, rank: int, world_size: int) -> Tensor:
    """The rank's part of a tensor cut along dimension 0 as :meth:`torch.Tensor.chunk` cuts it; empty past the last chunk.

    This is also how ``torch.distributed.tensor.Shard(0)`` cuts.
    """
    chunks = full.chunk(world_size)
    return chunks[rank] if rank < len(chunks) else full[:0]
