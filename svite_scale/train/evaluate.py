"""Exact evaluation on any number of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.engines.backend import Backend
from svite_scale.runtime.activity import Activity
from svite_scale.train.metrics import sum_over_ranks


@torch.no_grad()
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
    activity = activity or Activity()
    activity.enter("evaluation")
    backend.wrapped.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in data:
        activity.enter("evaluation")
        images, labels = transform(batch.images, batch.labels)
        logits = backend.forward(images).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        columns = [F.cross_entropy(logits, labels, reduction="none"), ranked[:, 0], ranked.any(dim=1), torch.ones_like(labels)]
        sums[:4] += torch.stack([column.cpu()[batch.valid].double().sum() for column in columns])
        sums[4] += batch.damaged.sum()
    backend.wrapped.train()
    loss, top1, top5, count, damaged = sum_over_ranks(sums.to(images.device))
    data.damage.check(damaged, count + damaged)
    return {
        f"{prefix}loss": loss / count,
        f"{prefix}accuracy": top1 / count,
        f"{prefix}top5": top5 / count,
        f"{prefix}damaged": int(damaged),
    }
