"""A run directory as it was left: one of its checkpoints, and what was written down on the way there."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from svite_scale.checkpoint.compatibility import check_same_tensors
from svite_scale.checkpoint.directory import CHECKPOINTS, CheckpointDirectory, newest_valid
from svite_scale.checkpoint.load import TensorReader, read_run_state
from svite_scale.checkpoint.manifest import problem_of
from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.data.remote.fetch import PIPE
from svite_scale.errors import CheckpointError, RunError
from svite_scale.models.sparse import build_sparse
from svite_scale.tracking.tracker import METRICS, TOPOLOGY

Line = dict[str, Any]
"""One JSON object of ``metrics.jsonl`` or ``topology.jsonl``."""


@dataclass(frozen=True)
class SavedRun:
    """A run up to one of its checkpoints.

    Attributes:
        run_dir: of the run.
        config: resolved.
        checkpoint: its directory.
        step: the optimizer step after which the checkpoint was saved.
        metrics: lines of ``metrics.jsonl`` up to that step; empty where there is no such file.
        topology: the same of ``topology.jsonl``.
        val: evaluation shards that whoever reads the run has named; None leaves it to the config.
    """

    run_dir: Path
    config: Config
    checkpoint: Path
    step: int
    metrics: list[Line]
    topology: list[Line]
    val: str | None = None

    def evaluation_config(self) -> Config:
        """The config, with the evaluation shards to use.

        Raises:
            RunError: its own are a command's output. The run may be somebody else's, and nothing of it is run.
        """
        if self.val is not None:
            return replace(self.config, data=replace(self.config.data, val=self.val))
        if self.config.data.val.startswith(PIPE):
            raise RunError(
                f"{self.run_dir / 'config.yaml'}: data.val = {self.config.data.val!r} is a command, and none is run that a run "
                "directory holds; give --val with shards, or with that command if you trust it"
            )
        return self.config


def read_run(run_dir: Path, checkpoint: str | None = None, val: str | None = None) -> SavedRun:
    """Reads all of a run but its tensors.

    Args:
        run_dir: of the run.
        checkpoint: name of one; None is the newest.
        val: evaluation shards, in place of the config's ``data.val``.

    Raises:
        RunError: there is no run, or a line of its files is damaged.
        ConfigError: its config can't be read.
        CheckpointError: there is no such checkpoint.
    """
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise RunError(f"{run_dir} holds no run: it has no config.yaml; give the run_dir of a run")
    config = read_config(config_path)
    path = find_checkpoint(run_dir / CHECKPOINTS, checkpoint)
    step: int = read_run_state(path)["topology"]["steps"]
    metrics, topology = (read_lines(run_dir / name, step) for name in (METRICS, TOPOLOGY))
    return SavedRun(run_dir, config, path, step, metrics, topology, val)


def find_checkpoint(directory: Path, name: str | None) -> Path:
    """The directory of a checkpoint, by default of the newest valid one.

    Raises:
        CheckpointError: there is none, or none of that name, which lists those that there are; or it is torn.
    """
    checkpoints = CheckpointDirectory(directory)
    if name is None:
        newest = newest_valid(checkpoints)
        if newest is None:
            raise CheckpointError(f"{directory} holds no complete checkpoint; train the run until it saves one")
        return newest
    names = sorted(path.name for path in checkpoints.named())
    if name not in names:
        raise CheckpointError(
            f"{directory} holds no checkpoint {name!r}; give --checkpoint one of {', '.join(names) or 'none'}"
        )
    if problem := problem_of(directory / name):
        raise CheckpointError(
            f"{directory / name} is incomplete or corrupt: {problem}; restore it, or give another --checkpoint"
        )
    return directory / name


def read_lines(path: Path, last_step: int) -> list[Line]:
    """The JSON objects of a file, one a line, up to a step; none where there is no file.

    Raises:
        RunError: a line is no object with a step; the message has its number. Or the file can't be read.
    """
    if not path.exists():
        return []
    try:
        texts = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise RunError(f"{path} can't be read ({error}); restore it, or remove it") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line: Line = json.loads(text)
            if type(line["step"]) is not int:
                raise TypeError("the step is no whole number")
            if line["step"] <= last_step:
                lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged_line(path, f"line {number}", error) from error
    return lines


def damaged_line(path: Path, line: str, error: Exception) -> RunError:
    """What to say of a line of a file that can't be read."""
    return RunError(f"{path}: {line} is damaged ({error!r}); restore the line, or delete it")


def load_model(run: SavedRun) -> nn.Module:
    """The checkpoint's model on the CPU, in fp32, set to evaluate. No collective: it needs no process group.

    Raises:
        ConfigError: the model can't be built.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    model, _ = build_sparse(run.config.model, run.config.sparsity, run.config.seed)
    parameters = dict(model.named_parameters())
    # Flat, as every engine saves them.
    state = {f"model/{name}": torch.empty_like(parameter).flatten() for name, parameter in parameters.items()}
    try:
        check_same_tensors(run.checkpoint, state, prefix="model/")
        with warnings.catch_warnings():
            # It warns that there is no process group, which is what no_dist says.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, storage_reader=TensorReader(run.checkpoint), no_dist=True)
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, CheckpointException) as error:
        what = type(error).__name__ if isinstance(error, CheckpointException) else repr(error)
        raise CheckpointError(f"{run.checkpoint} can't be read ({what}); restore it, or give another --checkpoint") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"model/{name}"].view_as(parameter))
    return model.eval()
