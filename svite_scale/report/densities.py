"""How dense the layers are, and how that came about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from svite_scale.report.saved_run import Line, damaged_line
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.tracking.tracker import METRICS

CURVES = ("ever_active", "heads/ever_active", "neurons/ever_active", "drop_fraction")
"""Metrics that are shown over time."""

OLD_NAMES = {"drop_rate": "drop_fraction"}
"""Metrics of older runs, by the name that they have now."""


class LayerDensity(NamedTuple):
    """The share of a layer's units that is active; a unit is what its name says: weights, heads, or neurons."""

    layer: str
    unit: str
    density: float


class Curve(NamedTuple):
    """One metric by optimizer step."""

    name: str
    steps: list[int]
    values: list[float]


@torch.no_grad()
def layer_densities(model: nn.Module) -> list[LayerDensity]:
    """Of each sparse layer, counted in its mask, in the model's order; ``model`` is not wrapped by any engine."""
    densities = []
    for name, layer in sparse_layers(model).items():
        active = bits.unpack(layer.mask, layer.shape.numel())
        densities.append(LayerDensity(name, layer.unit, int(active.count_nonzero()) / active.numel()))
    return densities


def curves(metrics: Sequence[Line]) -> list[Curve]:
    """Those of :data:`CURVES` that some line of ``metrics.jsonl`` has.

    Raises:
        RunError: one isn't a number.
    """
    found = []
    metrics = [{OLD_NAMES.get(name, name): value for name, value in line.items()} for line in metrics]
    for name in CURVES:
        having = [line for line in metrics if name in line]
        if having:
            found.append(Curve(name, [line["step"] for line in having], [_number(line, name) for line in having]))
    return found


def _number(line: Line, name: str) -> float:
    value = line[name]
    if type(value) not in (int, float):
        raise damaged_line(Path(METRICS), f"{name} of step {line['step']}", TypeError(f"{str(value)[:40]!r} is no number"))
    return float(value)
