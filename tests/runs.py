"""Runs of a config on real ranks, and their states and metrics."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svite_scale.checkpoint.checkpoint import Checkpoint
from svite_scale.config.schema import Config
from svite_scale.engines.moments import scalars
from svite_scale.runtime.world import World
from svite_scale.sparsity.sharding import own_chunk
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.train.trainer import Trainer

ENGINES = {
    "single": ("parallel.backend=single",),
    "ddp": ("parallel.backend=ddp",),
    "fsdp2": ("parallel.backend=fsdp2",),
    "zero1": ("parallel.backend=deepspeed", "parallel.zero_stage=1"),
    "zero2": ("parallel.backend=deepspeed", "parallel.zero_stage=2"),
    "zero3": ("parallel.backend=deepspeed", "parallel.zero_stage=3"),
}
"""Overrides that choose an engine."""


@dataclass
class State:
    """The state of a rank's trainer, in full tensors except for ``statistics``, which are this rank's chunks.

    Attributes:
        step: optimizer steps done.
        tensors: parameters by name, moments by ``name:moment``, averages by ``name:ema``.
        statistics: of the topology, by name.
        scalars: the optimizer's, such as its own count of steps.
    """

    step: int
    tensors: dict[str, np.ndarray[Any, Any]]
    statistics: dict[str, np.ndarray[Any, Any]]
    scalars: dict[str, float]


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy().copy()


def state_of(trainer: Trainer) -> State:
    """A collective."""
    access = trainer.backend.access
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    with torch.no_grad():
        for name, parameter in trainer.backend.model.named_parameters():
            tensors[name] = array(access.read(parameter))
            if parameter.requires_grad:
                moments = access.moment_names(parameter)
                tensors |= {f"{name}:{moment}": array(access.read_moment(parameter, moment)) for moment in moments}
                if trainer.ema:
                    tensors[f"{name}:ema"] = array(trainer.ema.read(parameter))
    chunks = {name: array(chunk) for name, chunk in chunks_of(trainer.topology).items()}
    return State(trainer.step, tensors, chunks, scalars(trainer.backend.optimizer))


def chunks_of(topology: TopologyEngine) -> dict[str, Tensor]:
    """This rank's chunks of the statistics, by kind and layer."""
    kinds = topology.state_dict()
    del kinds["counters"]
    return {f"{kind}/{name}": own_chunk(tensor, None) for kind, tensors in kinds.items() for name, tensor in tensors.items()}


def run(config: Config, *, resume: bool = False) -> State:
    """Trains to the last step; returns the state at the end. A collective."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=resume)
    trainer.run()
    return state_of(trainer)


def resumed_run(config: Config) -> State:
    return run(config, resume=True)


def loaded(config: Config, save_to: Path | None = None) -> State:
    """Loads the newest checkpoint; returns the state. Saves it again if ``save_to`` names another ``checkpoints/``."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=True)
    if save_to is not None:
        copy = Checkpoint(save_to, config, trainer.checkpoint.run)
        copy.save(trainer.step)
        copy.wait()
    return state_of(trainer)


def whole_statistics(states: list[State]) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the statistics in full, put together from the ranks' chunks."""
    return {name: np.concatenate([state.statistics[name] for state in states]) for name in states[0].statistics}


def assert_same_state(left: list[State], right: list[State]) -> None:
    """Compares two states bit by bit, on all ranks of both."""
    for state in (*left[1:], *right):
        assert (state.step, state.scalars) == (left[0].step, left[0].scalars)
        assert state.tensors.keys() == left[0].tensors.keys()
        for name, tensor in state.tensors.items():
            np.testing.assert_array_equal(tensor, left[0].tensors[name], err_msg=name)
    ours, theirs = whole_statistics(left), whole_statistics(right)
    assert ours.keys() == theirs.keys()
    for name, statistic in ours.items():
        np.testing.assert_array_equal(statistic, theirs[name], err_msg=name)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return json_lines(run_dir / "metrics.jsonl")


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir)]


class Lines(logging.Handler):
    """Keeps the lines that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
