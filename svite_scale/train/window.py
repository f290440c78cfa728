"""What is averaged between two lines of metrics."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.data.loader import Batch
from svite_scale.engines.backend import StepResult


class MetricsWindow:
    """Loss, accuracy and throughput since the last line, over all ranks.

    Attributes:
        samples: those of the window closed last, over all ranks, in steps that were applied.
        damaged: how many of them couldn't be decoded, so that others stood in.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums, self._step_sums = torch.zeros(2, 4, dtype=torch.float64, device=device)
        self._grad_norm: Tensor | None = None
        self.samples = self.damaged = 0
        self.restart()

    def add(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """One micro-batch: its mean loss, scalar, and its logits ``[B, classes]``. Doesn't wait for the device."""
        size, damaged = len(batch.labels), int(batch.damaged.sum())
        correct = (logits.argmax(dim=1) == batch.labels.to(logits.device)).sum()
        self._step_sums += torch.stack([loss * size, correct, torch.full_like(loss, size), torch.full_like(loss, damaged)])

    def step(self, result: StepResult) -> None:
        """One optimizer step is done. The micro-batches since the last one count if it was applied."""
        self._steps += 1
        if result.applied:
            self._grad_norm = result.grad_norm
            self._sums += self._step_sums
        self._step_sums.zero_()

    def close(self, global_batch_size: int) -> dict[str, float]:
        """The averages since the last restart, without loss and accuracy where no step was applied. A collective."""
        dist.all_reduce(self._sums)
        loss, correct, count, damaged = self._sums.tolist()
        self.samples, self.damaged = int(count), int(damaged)
        seconds = time.perf_counter() - self._started
        metrics = {"loss": loss / count, "accuracy": correct / count} if count else {}
        metrics["samples_per_second"] = self._steps * global_batch_size / seconds
        return metrics if self._grad_norm is None else {**metrics, "grad_norm": float(self._grad_norm)}

    def restart(self) -> None:
        """Forgets all; what passed since :meth:`close` (an evaluation, a save) doesn't count as training time."""
        self._sums.zero_()
        self._grad_norm = None
        self._steps, self._started = 0, time.perf_counter()
