"""Exact evaluation on any number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.engines.backend import Backend
from svite_scale.runtime.activity import Activity
from svite_scale.train.ema import Ema


@torch.no_grad()
def evaluate(
    backend: Backend, data: EvalData, transform: DeviceTransform, activity: Activity | None = None
) -> dict[str, float]:
    """Evaluates every sample once. A collective: all ranks have equally many batches.

    Returns:
        Over all samples that can be decoded: mean cross entropy, and the share whose label is the model's first guess, or
        among its first five. ``eval_damaged`` counts the others.

    Raises:
        DataError: the samples can't be read, or too many of them not be decoded.
    """
    backend.wrapped.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in (activity or Activity()).each(data, "evaluation"):
        images, labels = transform(batch.images, batch.labels)
        logits = backend.forward(images).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        columns = [F.cross_entropy(logits, labels, reduction="none"), ranked[:, 0], ranked.any(dim=1), torch.ones_like(labels)]
        sums[:4] += torch.stack([column.cpu()[batch.valid].double().sum() for column in columns])
        sums[4] += batch.damaged.sum()
    backend.wrapped.train()
    sums = sums.to(images.device)
    dist.all_reduce(sums)
    loss, top1, top5, count, damaged = sums.tolist()
    data.damage.check(damaged, count + damaged)
    return {
        "eval_loss": loss / count,
        "eval_accuracy": top1 / count,
        "eval_top5": top5 / count,
        "eval_damaged": int(damaged),
    }


def evaluate_ema(
    ema: Ema, backend: Backend, data: EvalData, transform: DeviceTransform, activity: Activity | None = None
) -> dict[str, float]:
    """What :func:`evaluate` returns, of the average of the weights, named ``eval_ema_loss`` and so on. A collective."""
    with ema.in_place_of_weights():
        metrics = evaluate(backend, data, transform, activity)
    return {name.replace("eval_", "eval_ema_", 1): value for name, value in metrics.items()}
