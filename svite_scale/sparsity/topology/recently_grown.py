"""Which active weights came at the last update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.sharding import gather_chunks, rank_and_size, rank_chunk
from svite_scale.sparsity.transition import Remap


class Newcomers:
    """One bit per active weight of every packed layer, in the order of ``values``, each rank keeping its chunk.

    A weight that an update drops and grows again never left, so it doesn't come either.

    Attributes:
        chunks: by layer name, this rank's chunk of the layer's uint8 ``[ceil(k / 8)]``.
    """

    def __init__(self, layers: Iterable[SparseLayer], group: dist.ProcessGroup | None) -> None:
        """Starts with none. ``group`` is the data-parallel ranks, None without ``torch.distributed``."""
        self.group = group
        self.rank, self.world_size = rank_and_size(group)
        self.chunks: dict[str, Tensor] = {}
        for layer in layers:
            self.clear(layer)

    def clear(self, layer: SparseLayer) -> None:
        """None of the layer's have come. Local."""
        self._write(layer, torch.zeros(layer.num_active, dtype=torch.bool, device=layer.mask.device))

    def read(self, layer: SparseLayer) -> Tensor:
        """The layer's newcomers, bool ``[k]``, on every rank. A collective."""
        whole = gather_chunks(self.chunks[layer.name], bits.num_bytes(layer.num_active), self.group)
        return bits.unpack(whole, layer.num_active)

    def follow(self, layer: SparseLayer, remap: Remap) -> float | None:
        """Goes on to a new topology of a layer. A collective.

        Returns:
            Of the weights that came at the update before this one, the share that is still active; None where there were none.
        """
        before = self.read(layer)
        came, stayed = int(before.count_nonzero()), int(remap.carry(before, False).count_nonzero())
        self._write(layer, ~remap.stays)
        return stayed / came if came else None

    def _write(self, layer: SparseLayer, flags: Tensor) -> None:
        self.chunks[layer.name] = rank_chunk(bits.pack(flags), self.rank, self.world_size).clone()
