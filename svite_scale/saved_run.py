"""A saved run: its files up to one of its checkpoints, that checkpoint's model, and its evaluation images."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from svite_scale.checkpoint.compatibility import check_same_tensors
from svite_scale.checkpoint.directory import CHECKPOINTS, CheckpointDirectory, newest_valid
from svite_scale.checkpoint.load import TensorReader, read_run_state, saved_counts
from svite_scale.checkpoint.manifest import MANIFEST, digest, problem_of
from svite_scale.config.earlier import read_saved_config
from svite_scale.config.schema import Config
from svite_scale.data.dataset import ShardDataset
from svite_scale.data.format.files import read_regular
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.remote.fetch import PIPE
from svite_scale.data.transforms import DeviceTransform, eval_transform
from svite_scale.errors import CheckpointError, DataError, RunError
from svite_scale.models.sparse import build_sparse
from svite_scale.models.token_insertion import remove_token_selectors
from svite_scale.tracking.tracker import METRICS, TOPOLOGY

Line = dict[str, Any]
"""One line of ``metrics.jsonl`` or ``topology.jsonl``, a JSON object."""


@dataclass(frozen=True)
class SavedRun:
    """A run up to one of its checkpoints.

    Attributes:
        run_dir: of the run.
        config: resolved.
        checkpoint: directory of the checkpoint.
        step: the optimizer step after which the checkpoint was saved.
        metrics: lines of ``metrics.jsonl`` up to that step; empty without the file.
        topology: the same of ``topology.jsonl``.
        val: evaluation shards named by the reader; None uses those of the config.
    """

    run_dir: Path
    config: Config
    checkpoint: Path
    step: int
    metrics: list[Line]
    topology: list[Line]
    val: str | None = None

    def evaluation_folder(self, *, ema: bool = False) -> Path:
        """Returns the folder where the evaluation of the checkpoint lies, if there was one."""
        return self.run_dir / "evaluation" / (self.checkpoint.name + ("-ema" if ema else ""))

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint's manifest, which tells it from any other checkpoint of the same name."""
        return digest(self.checkpoint / MANIFEST).sha256

    def evaluation(self, *, ema: bool = False) -> dict[str, Any] | None:
        """Returns the content of the checkpoint's ``evaluation.json``; None without one.

        An evaluation of an earlier checkpoint of the same name is left out.

        Raises:
            RunError: the file is damaged.
        """
        path = self.evaluation_folder(ema=ema) / "evaluation.json"
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found if found.get("checkpoint_digest") == self.digest else None
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            remedy = f"evaluate the checkpoint again, or remove {path.parent}"
            raise RunError(f"{path} can't be read ({error!r}); {remedy}") from error

    def evaluation_config(self) -> Config:
        """Returns the config with the evaluation shards to use.

        Raises:
            RunError: the config's own are the output of a command. The run may be somebody else's, so nothing in it is run.
        """
        if self.val is not None:
            return replace(self.config, data=replace(self.config.data, val=self.val))
        if self.config.data.val.startswith(PIPE):
            raise RunError(
                f"{self.run_dir / 'config.yaml'}: data.val = {self.config.data.val!r} is a command, and commands in a run "
                "directory are not run; give other shards (--val, or data.val=SHARDS), or that command if you trust it"
            )
        return self.config


def read_run(run_dir: Path, checkpoint: str | None = None, val: str | None = None) -> SavedRun:
    """Reads everything of a run except its tensors.

    Args:
        run_dir: of the run.
        checkpoint: its name; None takes the newest valid one.
        val: evaluation shards, in place of the config's ``data.val``.

    Raises:
        RunError: the directory holds no run, or a line of its files is damaged.
        ConfigError: its config can't be read.
        CheckpointError: there is no such checkpoint.
    """
    config = read_run_config(run_dir)
    path = find_checkpoint(run_dir / CHECKPOINTS, checkpoint)
    step: int = read_run_state(path)["step"]
    metrics, topology = (read_lines(run_dir / name, step) for name in (METRICS, TOPOLOGY))
    return SavedRun(run_dir, config, path, step, metrics, topology, val)


def read_run_config(run_dir: Path) -> Config:
    """Returns the resolved config of a run.

    Raises:
        RunError: the directory holds no run.
        ConfigError: the config can't be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RunError(f"{run_dir} holds no run: it has no config.yaml; give the run_dir of a run")
    return read_saved_config(path)


def find_checkpoint(directory: Path, name: str | None) -> Path:
    """Returns the directory of a checkpoint, given its name, or of the newest valid one.

    Raises:
        CheckpointError: there is none, or none of that name; the message lists those there are. Or it isn't valid.
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
    """Returns the JSON objects of a file up to a step, one per line; empty without the file.

    A last line without its end is left out, because the run is writing it, or was stopped while it did.

    Raises:
        RunError: a line is no object with a step; the message has the line's number. Or the file can't be read.
    """
    if not path.exists():
        return []
    try:
        texts = read_regular(path).decode(errors="replace").split("\n")[:-1]
    except OSError as error:
        raise RunError(f"{path} can't be read ({error}); restore it, or remove it") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line: Line = json.loads(text)
            if type(line["step"]) is not int or line["step"] < 0:
                raise TypeError("the step is no whole number from 0 on")
            if line["step"] <= last_step:
                lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged_line(path, f"line {number}", error) from error
    return lines


def damaged_line(path: Path, line: str, error: Exception) -> RunError:
    """Returns the error to raise for a damaged line of a file."""
    return RunError(f"{path}: {line} is damaged ({error!r}); restore the line, or delete it")


def load_model(run: SavedRun, *, ema: bool = False) -> nn.Module:
    """Returns the checkpoint's sparse model on the CPU, in fp32 and evaluation mode. Local: needs no process group.

    It doesn't have token selectors that were there for training only.

    Args:
        run: holds the checkpoint.
        ema: take the moving average of the weights in place of the weights.

    Raises:
        ConfigError: the model can't be built.
        CheckpointError: the checkpoint is damaged, of another model, or has no average.
    """
    if ema and run.config.train.ema_decay is None:
        raise CheckpointError(f"{run.run_dir} has no moving average (train.ema_decay is null); leave out --ema")
    model, _ = build_sparse(run.config.model, run.config.sparsity, run.config.seed, saved_counts(run.checkpoint))
    parameters = dict(model.named_parameters())
    keys = {name: f"ema/{name}" if ema and each.requires_grad else f"model/{name}" for name, each in parameters.items()}
    # Flat, as every engine saves them.
    state = {keys[name]: torch.empty_like(parameter).flatten() for name, parameter in parameters.items()}
    try:
        check_same_tensors(run.checkpoint, {f"model/{name}": state[key] for name, key in keys.items()}, prefix="model/")
        with warnings.catch_warnings():
            # Torch warns that there is no process group, as no_dist says.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, storage_reader=TensorReader(run.checkpoint), no_dist=True)
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, CheckpointException) as error:
        what = type(error).__name__ if isinstance(error, CheckpointException) else repr(error)
        raise CheckpointError(f"{run.checkpoint} can't be read ({what}); restore it, or give another --checkpoint") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[keys[name]].view_as(parameter))
    if run.config.sparsity.tokens.training_keep is not None:
        remove_token_selectors(model)
    return model.eval()


class EvaluationImages(NamedTuple):
    """A batch of evaluation images.

    Attributes:
        samples: int64 ``[B]``, number of each image among all evaluation samples.
        labels: int64 ``[B]``.
        pixels: uint8 ``[B, C, H, W]``.
        inputs: of the model, fp32 ``[B, C, H, W]``.
    """

    samples: Tensor
    labels: Tensor
    pixels: Tensor
    inputs: Tensor


def evaluation_images(config: Config, count: int) -> EvaluationImages:
    """Returns up to ``count`` evaluation images, spread evenly over the shards, because shards are often sorted by class.

    Raises:
        DataError: the shards can't be read, or hold no sample.
    """
    data, model = config.data, config.model
    indexes = load_indexes(data.val, "data.val", data)
    transform = eval_transform(data, model.image_size)
    dataset = ShardDataset(indexes, transform, model.in_channels, seed=0, max_pixels=data.max_pixels)
    if not len(dataset):
        raise DataError(f"data.val = {data.val!r} holds no samples; write shards that do")
    samples = np.arange(min(count, len(dataset))) * len(dataset) // min(count, len(dataset))
    pixels, labels = zip(*(dataset[0, sample, 0] for sample in samples.tolist()), strict=True)
    images, targets = torch.stack(pixels), torch.tensor(labels)
    inputs, _ = DeviceTransform(data, model.num_classes, torch.device("cpu"), training=False)(images, targets)
    return EvaluationImages(torch.from_numpy(samples), targets, images, inputs)
