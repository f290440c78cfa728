"""Growth statistics: dense gradients of the last steps before an update, averaged and sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.sharding import chunk_numel, gather_chunks, padded, rank_and_size, rank_numel
from svite_scale.sparsity.topology.backward_runs import BackwardRuns, reaches


class GrowthScores:
    """Magnitude of the dense gradient of every sparse layer over a window of steps. Each rank keeps 1/W of it.

    While it records, each backward of a layer passes its dense gradient on, which is reduce-scattered at once: no rank ever
    holds more than one layer's dense gradient. While it doesn't record, nothing is held and nothing is sent. Gradients are
    averaged over ranks and steps, and summed over the micro-batches of a step, whose losses the training loop scales. A
    backward counts if it gives the layer's own parameters a gradient, in training mode or not. A backward that raised doesn't
    count, nor does what was recorded before it in the same step.

    Attributes:
        recorded_steps: optimizer steps recorded in full.
        is_recording: whether backwards are recorded.
        sums: by layer name, this rank's chunk of the sum over the window, fp32 ``[ceil(N / W)]``, zeros past the end.
        frozen: names of layers that were frozen during some recorded step, the same on every rank.
    """

    def __init__(self, layers: Iterable[SparseLayer], group: dist.ProcessGroup | None, *, by: str = "gradient") -> None:
        """Starts without recording.

        Args:
            layers: of one model.
            group: the data-parallel ranks; None without ``torch.distributed``.
            by: :attr:`~svite_scale.sparsity.options.MethodOptions.grow_by`.
        """
        self.layers = list(layers)
        self.group = group
        self.rank, self.world_size = rank_and_size(group)
        self.by_magnitude = by == "magnitude"
        self.recorded_steps = 0
        self.is_recording = False
        self.sums: dict[str, Tensor] = {}
        self.frozen: set[str] = set()
        self._this_step: dict[str, Tensor] = {}
        self._recorded: set[str] = set()
        self._frozen_before: set[str] = set()
        self._backwards = BackwardRuns()

    def start_recording(self, update_step: int) -> None:
        """Records the layers' backwards from now on, for the update after step ``update_step``; adds to what is recorded."""
        self.is_recording = True
        self._frozen_before = self._frozen_now()
        for layer in self.layers:
            layer.update_step = update_step
            layer.gradient_hook = partial(self._add, layer)

    def stop_recording(self) -> None:
        """Records no more, and forgets what was recorded."""
        self.is_recording = False
        for layer in self.layers:
            layer.gradient_hook = None
        self.clear()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recorded_steps = 0
        self.sums.clear()
        self.frozen.clear()
        self.discard_step()

    def discard_step(self) -> None:
        """Forgets what was recorded since the last optimizer step."""
        if self.recorded_steps == 0:
            self.sums.clear()
        self._this_step.clear()
        self._recorded.clear()

    def end_step(self, *, applied: bool = True) -> None:
        """Ends an optimizer step: adds what was recorded since the last one to the sums, or forgets it if it wasn't applied."""
        if self.is_recording and applied:
            self.recorded_steps += 1
            for name, gradient in self._this_step.items():
                self._accumulate(self.sums, name, gradient.abs_() if self.by_magnitude else gradient)
            # A layer that was thawed before the step's backward was recorded; one thawed after it wasn't.
            self.frozen |= self._frozen_now() | (self._frozen_before - self._recorded)
            for name in self.frozen:
                self.sums.pop(name, None)
        self.discard_step()

    def all_finite(self) -> bool:
        """Returns whether every recorded gradient is finite, on every rank. A collective, unless nothing was recorded."""
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
        """Checks that every layer that isn't frozen has a recorded gradient.

        Raises:
            TopologyError: names the layers that have none.
        """
        missing = [layer.name for layer in self.layers if layer.name not in self.sums.keys() | self.frozen]
        if missing:
            raise TopologyError(
                f"no gradient of {', '.join(missing)} was recorded before a topology update: call topology.step() once after "
                "each optimizer step, and let every packed layer take part in the loss, or freeze it"
            )

    def gather(self, layer: SparseLayer) -> Tensor:
        """Returns the layer's scores, fp32 ``[N]``, on every rank; a new tensor. A collective."""
        whole = gather_chunks(self.sums[layer.name], layer.growth_numel, self.group)
        magnitude = whole.abs() if self.group is None else whole.abs_()
        # Scaled once, here: scaling each term would break ties among sums that are equal.
        return magnitude.div_(self.world_size * max(self.recorded_steps, 1))

    def chunk(self, layer: SparseLayer) -> Tensor:
        """Returns this rank's chunk of the layer's sum without the zeros past the end; zeros if no step is recorded in full."""
        numel = rank_numel(layer.growth_numel, self.rank, self.world_size)
        if self.recorded_steps and layer.name in self.sums:
            return self.sums[layer.name][:numel]
        return torch.zeros(numel, device=layer.mask.device)

    def load(self, sums: Mapping[str, Tensor], recorded_steps: int, recorded_ranks: int, frozen: set[str]) -> None:
        """Resumes in a window of which ``recorded_ranks`` ranks recorded ``recorded_steps`` steps. Local.

        Args:
            sums: by layer name, this rank's part, cut as :meth:`chunk` cuts, of all layers that weren't frozen.
            recorded_steps: optimizer steps recorded in full; 0 outside of windows.
            recorded_ranks: ranks whose gradients the sums add up.
            frozen: names of layers that were frozen during some of these steps.
        """
        self.clear()
        self.recorded_steps, self.frozen = recorded_steps, frozen
        for layer in self.layers:
            if layer.name in sums:
                size = chunk_numel(layer.growth_numel, self.world_size)
                # The mean of the gradients stays the same, for as many ranks as there are now.
                scale = self.world_size / recorded_ranks
                self.sums[layer.name] = padded(sums[layer.name].to(layer.mask.device), size) * scale

    def _add(self, layer: SparseLayer, gradient: Tensor) -> None:
        """Adds one micro-batch's dense gradient. A collective, called inside backward in the same order on every rank."""
        if not reaches(part.parameter for part in layer.unit_parameters().values()):
            return
        if self._backwards.given_up():
            self.discard_step()
        self._recorded.add(layer.name)
        # In the window's first step gradients go straight into the sums, which are cleared anyway if the step isn't applied.
        held = self._this_step if self.by_magnitude or self.recorded_steps else self.sums
        self._accumulate(held, layer.name, self._reduce_scatter(gradient.flatten().float()))

    def _frozen_now(self) -> set[str]:
        return {layer.name for layer in self.layers if layer.is_frozen}

    def _accumulate(self, held: dict[str, Tensor], name: str, chunk: Tensor) -> None:
        if name in held:
            held[name].add_(chunk)
        else:
            held[name] = chunk

    def _reduce_scatter(self, gradient: Tensor) -> Tensor:
        """Returns the sum over ranks of this rank's part of a flat gradient, padded with zeros; a new tensor."""
        if self.group is None:
            return gradient.clone()
        size = chunk_numel(gradient.numel(), self.world_size)
        chunk = gradient.new_empty(size)
        dist.reduce_scatter_tensor(chunk, padded(gradient, size * self.world_size), group=self.group)
        return chunk
