"""The throughput of a model beside its dense twin's: images per second of inference, in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from svite_scale.evaluation.subject import ON_CPU, Subject, place
from svite_scale.evaluation.timing import alternate, ratio
from svite_scale.export.sliced_form import is_smaller, slice_model
from svite_scale.models.dense import build_dense
from svite_scale.tracking.progress import track
from svite_scale.train.evaluate import Forward

BATCHES = (1, 32)
"""Batch sizes if none are given."""

SECONDS = 60.0
"""Time for the rounds of one batch size, about; there are from :data:`FEWEST` to :data:`MOST` rounds."""

FEWEST, MOST = 5, 50
DENSE = "dense"
COMPILED = " compiled"
"""End of the name of a model that torch.compile has compiled."""


def measure_throughput(
    subject: Subject, batches: Sequence[int], device: torch.device, *, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Times a model, its sliced form where heads, neurons or tokens are absent, and its dense twin, with and without
    torch.compile, on images of noise. Local.

    Args:
        subject: the model.
        batches: batch sizes.
        device: to compute on.
        seconds: for the rounds of one batch size, about.

    Returns:
        For each batch size, see :func:`compare`.
    """
    config = subject.config
    forwards = {name: place(model, config, device) for name, model in models_to_time(subject).items()}
    shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
    found = []
    for batch in track(batches, "throughput", len(batches), "batch sizes"):
        # Dynamo would fall back to eager after a few sizes.
        torch.compiler.reset()
        images = torch.randn(batch, *shape, device=device)
        tasks = {name: task(forward, images) for name, forward in forwards.items()}
        for name, forward in forwards.items():
            if name not in ON_CPU:
                tasks[name + COMPILED] = task(torch.compile(forward, dynamic=False), images)
        found.append({"batch": batch, **compare(tasks, batch, device, seconds)})
    return found


def models_to_time(subject: Subject) -> dict[str, nn.Module]:
    """Returns the models by name, the dense twin first: timm's ordinary model of the same sizes, with all tokens."""
    model, config = subject.model, subject.config.model
    models = {DENSE: build_dense(config).eval(), subject.form: model}
    if subject.form == "sparse" and is_smaller(model):
        models["sliced"] = slice_model(model, config)
    return models


def task(forward: Forward, images: torch.Tensor) -> Callable[[], object]:
    """Returns a function that computes the logits of a batch, without gradients."""
    return torch.no_grad()(lambda: forward(images))


def compare(tasks: Mapping[str, Callable[[], object]], batch: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Times tasks of one batch each, in rounds of all of them.

    Returns:
        ``rounds``; and by task under ``models``: ``images_per_second``, the median over the rounds; ``speedup``, the median of
        the dense twin's time divided by the task's in the same round, and ``speedup_quartiles`` of the same.
    """
    for run in tasks.values():
        run()  # compiles
    started = time.perf_counter()
    for run in tasks.values():
        run()
    rounds = int(np.clip(seconds / (time.perf_counter() - started), FEWEST, MOST))
    times = alternate(tasks, rounds, device.type)
    models = {
        name: {
            "images_per_second": batch / float(np.median(own)),
            "speedup": ratio(times[DENSE], own),
            "speedup_quartiles": np.quantile(np.divide(times[DENSE], own), [0.25, 0.75]).tolist(),
        }
        for name, own in times.items()
    }
    return {"rounds": rounds, "models": models}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the result of :func:`measure_throughput` as text."""
    lines = [f"{'batch':>5}  {'model':18}{'images/s':>10}  times as fast as dense (quartiles)"]
    for entry in found:
        for name, own in entry["models"].items():
            low, high = own["speedup_quartiles"]
            speedup = f"{own['speedup']:.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"{entry['batch']:>5}  {name:18}{own['images_per_second']:>10.1f}  {speedup}")
    return "\n".join(lines)
