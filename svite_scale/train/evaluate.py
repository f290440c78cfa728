"""Exact evaluation on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svite_scale.data.loader import Batch, EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.engines.backend import Backend
from svite_scale.runtime.activity import Activity
from svite_scale.train.metrics import sum_over_ranks

Forward = Callable[[Tensor], Tensor]
"""A function from images, fp32 ``[B, C, H, W]``, to logits ``[B, classes]``."""


def evaluate(
    backend: Backend,
    data: EvalData,
    transform: DeviceTransform,
    activity: Activity | None = None,
    *,
    prefix: str = "eval_",
) -> dict[str, float]:
    """Evaluates the model once on every sample. A collective: all ranks call it, and have equally many batches.

    Args:
        backend: holds the model.
        data: this rank's evaluation samples.
        transform: prepares them on the device.
        activity: records each batch as progress, for the watchdog.
        prefix: of the names that are returned.

    Returns:
        ``eval_loss``, the mean cross entropy over all samples that can be decoded; ``eval_accuracy`` and ``eval_top5``, the
        fraction of them whose label is the first guess, or among the first five; ``eval_damaged``, the number of all others.

    Raises:
        DataError: the samples can't be read, or too many of them can't be decoded.
    """
    backend.wrapped.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    for logits, batch in evaluated_batches(backend.forward, data, transform, activity):
        accepted = F.one_hot(batch.labels.to(logits.device), logits.shape[1]).bool()
        scores = score(logits, accepted)
        columns = [scores.loss, scores.top1, scores.top5, torch.ones_like(batch.labels)]
        sums[:4] += torch.stack([column.cpu()[batch.valid].double().sum() for column in columns])
        sums[4] += batch.damaged.sum()
    backend.wrapped.train()
    loss, top1, top5, count, damaged = sum_over_ranks(sums.to(logits.device))
    data.damage.check(damaged, count + damaged)
    return {
        f"{prefix}loss": loss / count,
        f"{prefix}accuracy": top1 / count,
        f"{prefix}top5": top5 / count,
        f"{prefix}damaged": int(damaged),
    }


@torch.no_grad()
def evaluated_batches(
    forward: Forward, data: EvalData, transform: DeviceTransform, activity: Activity | None = None
) -> Iterator[tuple[Tensor, Batch]]:
    """Yields the logits of each batch, fp32 ``[B, classes]`` on the device, and the batch. A collective if ``forward`` is one.

    Args:
        forward: of a model in evaluation mode.
        data: this rank's evaluation samples.
        transform: prepares them on the device.
        activity: records each batch as progress, for the watchdog.

    Raises:
        DataError: the samples can't be read, or one can't be decoded and ``data.max_damaged`` is 0.
    """
    activity = activity or Activity()
    activity.enter("evaluation")
    for batch in data:
        activity.enter("evaluation")
        images, _ = transform(batch.images, batch.labels)
        yield forward(images).float(), batch


class Scores(NamedTuple):
    """The scores of a batch of samples, each a tensor ``[B]``."""

    loss: Tensor
    """fp32, -log of the probability that the model gives to the accepted labels together: the cross entropy if it is one."""
    guess: Tensor
    """int64, the label of the highest logit."""
    top1: Tensor
    """bool, True where the guess is an accepted label."""
    top5: Tensor
    """bool, True where one of the first five guesses is."""


def score(logits: Tensor, accepted: Tensor) -> Scores:
    """Returns the scores of samples; what they are without an accepted label means nothing.

    Args:
        logits: fp32 ``[B, classes]``.
        accepted: bool ``[B, classes]``, the labels of each sample.
    """
    ranked = logits.topk(min(5, logits.shape[1])).indices
    hits = accepted.gather(1, ranked)
    loss = -logits.log_softmax(dim=1).masked_fill(~accepted, -torch.inf).logsumexp(dim=1)
    return Scores(loss, ranked[:, 0], hits[:, 0], hits.any(dim=1))
