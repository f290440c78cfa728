"""The averages between two lines of metrics."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.data.loader import Batch
from svite_scale.engines.backend import StepResult

SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "eval_accuracy": "test accuracy",
    "samples_per_second": "samples/s",
    "density": "density",
}
"""The metrics beside the count of steps, and their labels there."""


class MetricsAverage:
    """Loss, accuracy and throughput since the last line of metrics, over all ranks.

    Attributes:
        samples: samples of the applied steps that the last :meth:`reduce` averaged, over all ranks.
        damaged: how many of these couldn't be decoded, so that another sample took their place.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums, self._step_sums = torch.zeros(2, 4, dtype=torch.float64, device=device)
        self._grad_norm: Tensor | None = None
        self.samples = self.damaged = 0
        self.restart()

    def add(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Adds one micro-batch: its mean loss, a scalar, and its logits ``[B, classes]``. Doesn't wait for the device."""
        size, damaged = len(batch.labels), int(batch.damaged.sum())
        correct = (logits.argmax(dim=1) == batch.labels.to(logits.device)).sum()
        self._step_sums += torch.stack([loss * size, correct, torch.full_like(loss, size), torch.full_like(loss, damaged)])

    def end_step(self, result: StepResult) -> None:
        """Ends an optimizer step. Its micro-batches count if it was applied."""
        self._steps += 1
        if result.applied:
            self._grad_norm = result.grad_norm
            self._sums += self._step_sums
        self._step_sums.zero_()

    def reduce(self, global_batch_size: int) -> dict[str, float]:
        """Returns the averages since the last :meth:`restart`, over all ranks. A collective: all ranks call it.

        Loss and accuracy are missing if no step was applied.
        """
        loss, correct, count, damaged = sum_over_ranks(self._sums)
        self.samples, self.damaged = int(count), int(damaged)
        seconds = time.perf_counter() - self._started
        metrics = {"loss": loss / count, "accuracy": correct / count} if count else {}
        metrics["samples_per_second"] = self._steps * global_batch_size / seconds
        return metrics if self._grad_norm is None else {**metrics, "grad_norm": float(self._grad_norm)}

    def restart(self) -> None:
        """Forgets all steps. The time since :meth:`reduce` (an evaluation, a save) doesn't count as training time."""
        self._sums.zero_()
        self._grad_norm = None
        self._steps, self._started = 0, time.perf_counter()


def sum_over_ranks(sums: Tensor) -> list[float]:
    """Returns the elements of a 1-D tensor, each summed over all ranks in place. A collective: all ranks call it."""
    dist.all_reduce(sums)
    return sums.tolist()
