"""Growth statistics: dense gradients of one step, averaged and sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers import PackedLayer


def shard_numel(numel: int, world_size: int) -> int:
    """Positions of a layer that one rank keeps statistics for: a multiple of 8, so that bits shard at the same places."""
    return -(-numel // (8 * world_size)) * 8


class GrowthScores:
    """|dense gradient| of every packed layer, averaged over ranks and micro-batches, each rank keeping 1/W of it.

    Between :meth:`start` and :meth:`stop`, each backward of a layer hands over its dense gradient, which is reduce-scattered
    at once: no rank ever holds more than one layer's dense gradient, and outside that window nothing is held and nothing is
    sent.
    """

    def __init__(self, layers: Iterable[PackedLayer], group: dist.ProcessGroup | None) -> None:
        """Args:
        layers: of one model.
        group: the data-parallel ranks; None without ``torch.distributed``.
        """
        self.layers = list(layers)
        self.group = group
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self._shards: dict[str, Tensor] = {}

    def start(self) -> None:
        """Listens to the layers' backwards from now on, forgetting what was heard before."""
        self._shards.clear()
        for layer in self.layers:
            layer.gradient_sink = partial(self._add, layer)

    def stop(self) -> None:
        """Listens no more, and forgets what was heard."""
        for layer in self.layers:
            layer.gradient_sink = None
        self._shards.clear()

    def gather(self, layer: PackedLayer) -> Tensor:
        """The layer's scores, fp32 ``[N]``, on every rank. A collective.

        Raises:
            TopologyError: no backward reached the layer since :meth:`start`.
        """
        if layer.name not in self._shards:
            raise TopologyError(f"{layer.name}: no gradient reached this layer in the step of a topology update")
        shard = self._shards[layer.name]
        if self.group is None:
            return shard[: layer.shape.numel()].abs()
        full = shard.new_empty(self.world_size * shard.numel())
        dist.all_gather_into_tensor(full, shard, group=self.group)
        return full[: layer.shape.numel()].abs_()

    def _add(self, layer: PackedLayer, gradient: Tensor) -> None:
        """Adds one micro-batch's dense gradient. A collective, called inside backward in the same order on every rank."""
        shard = self._reduce_scatter(gradient.flatten().float())
        held = self._shards.setdefault(layer.name, torch.zeros_like(shard))
        held.add_(shard, alpha=1 / self.world_size)

    def _reduce_scatter(self, gradient: Tensor) -> Tensor:
        """Sum over ranks of this rank's part of a flat gradient, padded with zeros."""
        size = shard_numel(gradient.numel(), self.world_size)
        padded = torch.nn.functional.pad(gradient, (0, size * self.world_size - gradient.numel()))
        if self.group is None:
            return padded
        shard = padded.new_empty(size)
        dist.reduce_scatter_tensor(shard, padded, group=self.group)
        return shard
