"""A run as a report sees it: all that its directory holds so far, with or without a checkpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from svite_scale.checkpoint.directory import CHECKPOINTS, CheckpointDirectory
from svite_scale.config.schema import Config
from svite_scale.cost.flops import ModelCost, count_flops
from svite_scale.data.format.files import read_regular
from svite_scale.errors import RunError
from svite_scale.models.sparse import plan_sparse
from svite_scale.saved_run import Line, SavedRun, damaged_line, load_model, read_lines, read_run, read_run_config
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.options import FROM_WEIGHTS
from svite_scale.tracking.tracker import METRICS, TOPOLOGY

OLD_NAMES = {"drop_rate": "drop_fraction"}
"""Metrics of older runs, by the name that they have now."""

SUMMARY: dict[str, tuple[type, ...]] = {"seconds": (int, float), "steps": (int,), "world_size": (int,), "device": (str,)}
"""What a report reads of ``summary.json``, with its types."""

LARGEST, SMALLEST = 1e30, 1e-30
"""No figure of a run comes near; a chart could not be drawn with all that a float can be."""


class Curve(NamedTuple):
    """One metric by optimizer step."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class ReportedRun:
    """A run to report.

    Attributes:
        run_dir: of the run.
        config: resolved.
        metrics: lines of ``metrics.jsonl``, up to the checkpoint if one was asked for by name.
        topology: the same of ``topology.jsonl``.
        summary: ``summary.json``; empty as long as the run isn't finished.
        saved: the checkpoint; None if the run has saved none yet.
        model: of the checkpoint; on the meta device if there is none.
    """

    run_dir: Path
    config: Config
    metrics: list[Line]
    topology: list[Line]
    summary: dict[str, Any]
    saved: SavedRun | None
    model: nn.Module

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def step(self) -> int:
        """The last optimizer step that is known."""
        return max([line["step"] for line in self.metrics[-1:]] + [self.saved.step if self.saved else 0])

    @property
    def total_steps(self) -> int | None:
        """The optimizer steps of the whole run; None while no line of metrics tells how many an epoch has."""
        if self.is_finished:
            return self.step
        epochs = self.curve("epoch")
        if not epochs.values or epochs.values[-1] <= 0:
            return None
        total = math.ceil(self.config.train.epochs * epochs.steps[-1] / epochs.values[-1] - 1e-6)
        return min(total, self.config.train.max_steps or total)

    @property
    def is_finished(self) -> bool:
        return self.summary.get("steps") == self.step

    @property
    def world_size(self) -> int | None:
        """The number of ranks that trained last; None if it isn't known."""
        logged = self.last("world_size")
        return int(logged) if logged is not None and logged >= 1 else self.summary.get("world_size")

    @cached_property
    def cost(self) -> ModelCost:
        """On the device of the run; as long as it isn't finished, on one of this machine."""
        name = self.summary.get("device")
        device = name and ("cpu" if name == "cpu" else "cuda")
        return count_flops(self.model, self.config.model.image_size, device=device)

    def curve(self, name: str) -> Curve:
        """Returns the finite values of a metric, smaller than :data:`LARGEST`; empty if no line has it.

        Raises:
            RunError: a value isn't a number.
        """
        points = [(line["step"], number(line, name)) for line in self.metrics if name in line]
        points = [(step, value) for step, value in points if abs(value) < LARGEST]
        return Curve([step for step, _ in points], [value for _, value in points])

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric; None if there is none."""
        values = self.curve(name).values
        return values[-1] if values else None


def read_reported_run(run_dir: Path, checkpoint: str | None, val: str | None) -> ReportedRun:
    """Reads a run, whether it is finished or not.

    Args:
        run_dir: of the run.
        checkpoint: its name, which also ends the metrics; None takes all metrics and the newest valid checkpoint.
        val: evaluation shards, in place of the config's ``data.val``.

    Raises:
        RunError, ConfigError, CheckpointError, DataError: a part of the run can't be read.
    """
    config = read_run_config(run_dir)
    has_saved = checkpoint is not None or CheckpointDirectory(run_dir / CHECKPOINTS).named()
    saved = read_run(run_dir, checkpoint, val) if has_saved else None
    model = load_model(saved) if saved else _planned_model(config)
    last_step = saved.step if saved and checkpoint else sys.maxsize
    metrics, topology = (read_lines(run_dir / name, last_step) for name in (METRICS, TOPOLOGY))
    units = {name: layer.unit for name, layer in sparse_layers(model).items()}
    lines = [_with_means(line, units) for line in metrics]
    return ReportedRun(run_dir, config, lines, topology, _read_summary(run_dir), saved, model)


def _planned_model(config: Config) -> nn.Module:
    """Returns the model of a run without a checkpoint, on the meta device.

    The file of weights that the run started from may be gone. It is read only if its zeros say how many weights are active.
    """
    model = config.model if config.sparsity.masks == FROM_WEIGHTS else replace(config.model, weights=None)
    return plan_sparse(model, config.sparsity).model


def _with_means(line: Line, units: Mapping[str, str]) -> Line:
    """Returns a line of metrics by today's names, with ``grown_survival`` of each kind of unit: the mean over its layers.

    Args:
        line: of ``metrics.jsonl``.
        units: the kind of unit of each sparse layer.
    """
    line = {OLD_NAMES.get(name, name): value for name, value in line.items()}
    survivals: dict[str, list[float]] = {}
    for layer, unit in units.items():
        name = f"layers/grown_survival/{layer}"
        if name in line:
            survivals.setdefault("" if unit == "weights" else f"{unit}/", []).append(number(line, name))
    return line | {f"{prefix}grown_survival": sum(values) / len(values) for prefix, values in survivals.items()}


def number(line: Line, name: str) -> float:
    """Returns a metric of a line; infinity if it is very large or none, and 0 if it is very small.

    Raises:
        RunError: it isn't a number.
    """
    value = line[name]
    if type(value) not in (int, float):
        raise damaged_line(Path(METRICS), f"{name} of step {line['step']}", TypeError(f"{str(value)[:40]!r} is no number"))
    if abs(value) < SMALLEST:
        return 0.0
    return float(value) if abs(value) < LARGEST else math.inf


def _read_summary(run_dir: Path) -> dict[str, Any]:
    """Returns what a report needs of ``summary.json``; empty without the file."""
    path = run_dir / "summary.json"
    try:
        summary = json.loads(read_regular(path))
        for name, kinds in SUMMARY.items():
            value = summary[name]
            if type(value) not in kinds or (type(value) is not str and not 0 < value < LARGEST):
                raise TypeError(f"{name} is {str(value)[:40]!r}")
        return {name: summary[name] for name in SUMMARY}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({error!r}); restore it, or remove it") from error
