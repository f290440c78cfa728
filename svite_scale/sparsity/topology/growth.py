"""Growth statistics: dense gradients of the last steps before an update, averaged and sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.backward_runs import BackwardRuns, reaches
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.sharding import chunk_numel, gather_chunks, padded, rank_and_size, rank_numel


class GrowthScores:
    """Magnitude of the dense gradient of every packed layer over a window of steps, each rank keeping 1/W of it.

    While it listens, each backward of a layer hands over its dense gradient, which is reduce-scattered at once: no rank ever
    holds more than one layer's dense gradient. While it doesn't, nothing is held and nothing is sent. Gradients are averaged
    over ranks and steps and summed over the micro-batches of a step, whose losses are scaled by the training loop. A backward
    counts if it gives the layer's own parameters a gradient, in training mode or not; one that raised doesn't, nor what was
    heard before it in the same step.

    Attributes:
        num_steps: optimizer steps heard in full.
        listening: whether backwards are heard.
        sums: by layer name, this rank's chunk of the sum over the window, fp32 ``[ceil(N / W)]``, zeros past the end.
        frozen: names of layers that were frozen during some step heard, on every rank the same.
    """

    def __init__(self, layers: Iterable[SparseLayer], group: dist.ProcessGroup | None, *, by: str = "gradient") -> None:
        """Args:
        layers: of one model.
        group: the data-parallel ranks; None without ``torch.distributed``.
        by: ``gradient`` for |mean of the window's gradients|, ``magnitude`` for the mean of their magnitudes, step by step.
        """
        self.layers = list(layers)
        self.group = group
        self.rank, self.world_size = rank_and_size(group)
        self.by_magnitude = by == "magnitude"
        self.num_steps = 0
        self.listening = False
        self.sums: dict[str, Tensor] = {}
        self.frozen: set[str] = set()
        self._this_step: dict[str, Tensor] = {}
        self._heard: set[str] = set()
        self._frozen_before: set[str] = set()
        self._backwards = BackwardRuns()

    def listen(self, update_step: int) -> None:
        """Hears the layers' backwards from now on, for an update after that optimizer step; what was heard before stays."""
        self.listening = True
        self._frozen_before = self._frozen_now()
        for layer in self.layers:
            layer.update_step = update_step
            layer.gradient_sink = partial(self._add, layer)

    def stop(self) -> None:
        """Hears no more, and forgets what was heard."""
        self.listening = False
        for layer in self.layers:
            layer.gradient_sink = None
        self.clear()

    def clear(self) -> None:
        """Forgets what was heard."""
        self.num_steps = 0
        self.sums.clear()
        self.frozen.clear()
        self.forget_step()

    def forget_step(self) -> None:
        """Forgets what was heard since the last optimizer step."""
        if self.num_steps == 0:
            self.sums.clear()
        self._this_step.clear()
        self._heard.clear()

    def end_step(self, *, applied: bool = True) -> None:
        """An optimizer step is done: the micro-batches heard since the last one were its. Forgets them if it wasn't applied."""
        if self.listening and applied:
            self.num_steps += 1
            for name, gradient in self._this_step.items():
                self._accumulate(self.sums, name, gradient.abs_() if self.by_magnitude else gradient)
            # Where a layer was thawed before the step's backward, that was heard; where after it, it wasn't.
            self.frozen |= self._frozen_now() | (self._frozen_before - self._heard)
            for name in self.frozen:
                self.sums.pop(name, None)
        self.forget_step()

    def all_finite(self) -> bool:
        """Whether every gradient heard was finite, on every rank. A collective, unless nothing was heard."""
        if not self.sums:
            return True
        # A sum takes little time and no memory, but may overflow where its terms don't.
        finite = torch.stack([chunk.sum() for chunk in self.sums.values()]).isfinite().all()
        if not finite:
            finite = torch.stack([chunk.isfinite().all() for chunk in self.sums.values()]).all()
        finite = finite.int()
        if self.group is not None:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self.group)
        return bool(finite)

    def check_complete(self) -> None:
        """Raises:
        TopologyError: no backward reached some layer since it listens, though it isn't frozen.
        """
        missing = [layer.name for layer in self.layers if layer.name not in self.sums.keys() | self.frozen]
        if missing:
            raise TopologyError(
                f"no gradient of {', '.join(missing)} was heard before a topology update: call topology.step() once after each "
                "optimizer step, and let every packed layer take part in the loss, or freeze it"
            )

    def gather(self, layer: SparseLayer) -> Tensor:
        """The layer's scores, fp32 ``[N]``, on every rank. A collective."""
        whole = gather_chunks(self.sums[layer.name], layer.growth_numel, self.group)
        magnitude = whole.abs() if self.group is None else whole.abs_()
        # Scaled once, here: scaling each term would break ties among sums that are equal.
        return magnitude.div_(self.world_size * max(self.num_steps, 1))

    def chunk(self, layer: SparseLayer) -> Tensor:
        """This rank's chunk of the layer's sum without the zeros past the end; zeros where no step was heard in full."""
        numel = rank_numel(layer.growth_numel, self.rank, self.world_size)
        if self.num_steps and layer.name in self.sums:
            return self.sums[layer.name][:numel]
        return torch.zeros(numel, device=layer.mask.device)

    def load(self, sums: Mapping[str, Tensor], num_steps: int, num_ranks: int, frozen: set[str]) -> None:
        """Resumes in a window of which ``num_ranks`` ranks heard ``num_steps`` steps.

        Args:
            sums: by layer name, this rank's part, cut as :meth:`chunk` cuts, of all layers that weren't frozen.
            num_steps: optimizer steps heard in full; 0 outside of windows.
            num_ranks: ranks whose gradients the sums add up.
            frozen: names of layers that were frozen during some of these steps.
        """
        self.clear()
        self.num_steps, self.frozen = num_steps, frozen
        for layer in self.layers:
            if layer.name in sums:
                size = chunk_numel(layer.growth_numel, self.world_size)
                # The gradients' mean stays, for as many ranks as there are now.
                scale = self.world_size / num_ranks
                self.sums[layer.name] = padded(sums[layer.name].to(layer.mask.device), size) * scale

    def _add(self, layer: SparseLayer, gradient: Tensor) -> None:
        """Adds one micro-batch's dense gradient. A collective, called inside backward in the same order on every rank."""
        if not reaches(moving.parameter for moving in layer.moving().values()):
            return
        if self._backwards.given_up():
            self.forget_step()
        self._heard.add(layer.name)
        # The first step of a window needs no second buffer, for if it isn't applied, all is forgotten.
        held = self._this_step if self.by_magnitude or self.num_steps else self.sums
        self._accumulate(held, layer.name, self._reduce_scatter(gradient.flatten().float()))

    def _frozen_now(self) -> set[str]:
        return {layer.name for layer in self.layers if layer.is_frozen}

    def _accumulate(self, held: dict[str, Tensor], name: str, chunk: Tensor) -> None:
        if name in held:
            held[name].add_(chunk)
        else:
            held[name] = chunk

    def _reduce_scatter(self, gradient: Tensor) -> Tensor:
        """Sum over ranks of this rank's part of a flat gradient, padded with zeros; a new tensor."""
        if self.group is None:
            return gradient.clone()
        size = chunk_numel(gradient.numel(), self.world_size)
        chunk = gradient.new_empty(size)
        dist.reduce_scatter_tensor(chunk, padded(gradient, size * self.world_size), group=self.group)
        return chunk
