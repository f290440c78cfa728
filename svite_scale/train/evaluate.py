"""Exact evaluation on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from svite_scale.data import Batch, DeviceTransform
from svite_scale.parallel.backend import Backend


@torch.no_grad()
def evaluate(backend: Backend, data: Iterable[Batch], transform: DeviceTransform) -> dict[str, float]:
    """Evaluates every sample once. A collective: all ranks have equally many batches.

    Returns:
        Over all samples: mean cross entropy, and the share whose label is the model's first guess, or among its first five.
    """
    backend.wrapped.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in data:
        images, labels = transform(batch.images, batch.labels)
        logits = backend.forward(images).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        columns = [F.cross_entropy(logits, labels, reduction="none"), ranked[:, 0], ranked.any(dim=1), torch.ones_like(labels)]
        sums += torch.stack([column.cpu()[batch.valid].double().sum() for column in columns])
    backend.wrapped.train()
    sums = sums.to(images.device)
    dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    return {"eval_loss": loss / count, "eval_accuracy": top1 / count, "eval_top5": top5 / count}
