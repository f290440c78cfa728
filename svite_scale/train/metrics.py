"""The averages between two lines of metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.cost.flops import ModelCost
from svite_scale.data.loader import Batch
from svite_scale.engines.backend import StepResult
from svite_scale.models.token_selector import PaperSelector, TokenSelector

SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "eval_accuracy": "test accuracy",
    "samples_per_second": "samples/s",
}
"""The metrics beside the count of steps, and their labels there."""


class MetricsAverage:
    """Loss, accuracy and times since the last line of metrics, over all ranks.

    Attributes:
        samples: samples of the applied steps that the last :meth:`reduce` averaged, over all ranks.
        damaged: how many of these couldn't be decoded, so that another sample took their place.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums, self._step_sums = torch.zeros(2, 5, dtype=torch.float64, device=device)
        self._grad_norm: Tensor | None = None
        self._device = device
        self.samples = self.damaged = 0
        self.restart()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time in this context as time that this rank waits for data. The device may compute meanwhile."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def add(self, loss: Tensor, selector_loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Adds one micro-batch. Doesn't wait for the device.

        Args:
            loss: mean of the micro-batch, a scalar.
            selector_loss: the same of the token selectors' own loss.
            logits: ``[B, classes]``.
            batch: the micro-batch.
        """
        size, damaged = len(batch.labels), int(batch.damaged.sum())
        correct = (logits.argmax(dim=1) == batch.labels.to(logits.device)).sum()
        counts = torch.full_like(loss, size), torch.full_like(loss, damaged)
        self._step_sums += torch.stack([loss * size, selector_loss * size, correct, *counts])

    def end_step(self, result: StepResult) -> None:
        """Ends an optimizer step. Its micro-batches count if it was applied."""
        self._steps += 1
        if result.applied:
            self._grad_norm = result.grad_norm
            self._sums += self._step_sums
        self._step_sums.zero_()

    def reduce(self, global_batch_size: int) -> dict[str, float]:
        """Returns the averages since the last :meth:`restart`, over all ranks. A collective: all ranks call it.

        Returns:
            ``loss`` and ``accuracy``, unless no step was applied, and ``selector_loss`` if token selectors have one;
            ``grad_norm`` of the last applied step, if it is known;
            ``samples_per_second`` of all ranks together; ``step_seconds``, the mean per optimizer step; ``data_wait``, the
            fraction of that time that the rank which waits longest waits for data; and ``peak_memory_bytes`` of the rank that
            has used most since its start, see :func:`peak_memory`.
        """
        loss, selector_loss, correct, count, damaged = sum_over_ranks(self._sums)
        self.samples, self.damaged = int(count), int(damaged)
        seconds = time.perf_counter() - self._started
        metrics = {"loss": loss / count, "accuracy": correct / count} if count else {}
        if selector_loss:
            metrics["selector_loss"] = selector_loss / count
        data_wait, peak_memory_bytes = max_over_ranks([self._waited / seconds, peak_memory(self._device)], self._device)
        metrics |= {
            "samples_per_second": self._steps * global_batch_size / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait": data_wait,
            "peak_memory_bytes": int(peak_memory_bytes),
        }
        return metrics if self._grad_norm is None else {**metrics, "grad_norm": float(self._grad_norm)}

    def restart(self) -> None:
        """Forgets all steps. The time since :meth:`reduce` (an evaluation, a save) doesn't count as training time."""
        self._sums.zero_()
        self._grad_norm = None
        self._steps, self._waited, self._started = 0, 0.0, time.perf_counter()


def selector_metrics(selectors: Sequence[TokenSelector], progress: float) -> dict[str, float]:
    """Returns the metrics of token selectors at a fraction of training; empty without selectors.

    Returns:
        ``tokens``, the number that the last selector, which lets the fewest pass, lets pass in training; and ``temperature``,
        where there is one.
    """
    if not selectors:
        return {}
    last = selectors[-1]  # all have the same temperature
    metrics: dict[str, float] = {"tokens": last.tokens_at(progress)}
    if isinstance(last, PaperSelector):
        metrics["temperature"] = last.temperature_at(progress)
    return metrics


def sum_over_ranks(sums: Tensor) -> list[float]:
    """Returns the elements of a 1-D tensor, each summed over all ranks in place. A collective: all ranks call it."""
    dist.all_reduce(sums)
    return sums.tolist()


def max_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Returns the largest of each number over all ranks. A collective: all ranks call it."""
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def peak_memory(device: torch.device) -> int:
    """Returns the largest number of bytes that this process has used so far. Local.

    On a GPU these are torch's tensors there; on the CPU the resident memory of the process, without its loader processes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def flops_per_second(cost: ModelCost, samples_per_second: float) -> dict[str, float]:
    """Returns the floating-point operations per second that training takes, of all ranks together.

    Forward and backward of a sample take three times its forward. Each multiply-accumulate counts as two operations. A teacher,
    the optimizer and topology updates aren't counted.

    Returns:
        ``flops_per_second`` of what is really multiplied; and ``dense_flops_per_second``, what the dense twin would have to
        reach for as many samples per second.
    """
    operations = 3 * 2 * samples_per_second
    return {"flops_per_second": operations * cost.multiplied_macs, "dense_flops_per_second": operations * cost.dense_macs}
