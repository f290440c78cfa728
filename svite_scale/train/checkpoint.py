"""Checkpoints in logical coordinates, through torch.distributed.checkpoint.

Every tensor is stored flat under its parameter's name, each rank writing one chunk of it, whatever engine held it. So what one
engine saved on some number of ranks, another loads on another. A checkpoint is a directory of its own, named when it is
complete; the file ``latest`` then names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from svite_scale.config import Config
from svite_scale.config_reader import to_dict
from svite_scale.errors import CheckpointError
from svite_scale.parallel.backend import Backend
from svite_scale.parallel.moments import scalars, write_scalars
from svite_scale.sparsity.sharding import rank_chunk
from svite_scale.sparsity.topology import TopologyEngine
from svite_scale.train.tracking import flatten_config

LATEST = "latest"
RUN_STATE = "run.json"
FIXED_FIELDS = (
    "seed",
    "model.",
    "sparsity.",
    "distillation.",
    "optimizer.",
    "train.epochs",
    "train.global_batch_size",
    "data.shuffle_shards",
    "data.augment.",
)
"""Config fields, or sections, that a resumed run must share with the run it goes on with: they define what is computed."""


@dataclass(frozen=True)
class Checkpoint:
    """Saves and loads one run's state. All methods are collectives.

    Attributes:
        directory: ``checkpoints/`` of the run directory, seen by all ranks.
        config: of the run.
        backend: holds the model and the optimizer.
        topology: holds the step and the statistics.
    """

    directory: Path
    config: Config
    backend: Backend
    topology: TopologyEngine

    @torch.no_grad()
    def save(self) -> Path:
        """Writes the state after the topology's current step.

        Raises:
            CheckpointError: the directory can't be written.
        """
        step = self.topology.steps
        final = self.directory / f"step-{step:08d}"
        partial = final.with_suffix(".partial")
        try:
            dcp.save(self._state(), checkpoint_id=partial)
            if dist.get_rank() == 0:
                self._publish(partial, final)
        except OSError as error:
            raise CheckpointError(f"can't save to {final}: {error}; free or mount the disk and resume the run") from error
        dist.barrier()
        return final

    @torch.no_grad()
    def load(self) -> int:
        """Loads what ``latest`` names; the optimizer's state must exist (after one step, of learning rate 0 say).

        Returns:
            The optimizer step to go on after.

        Raises:
            CheckpointError: there is none, or it belongs to another model or recipe.
        """
        path = latest(self.directory)
        run_state = json.loads((path / RUN_STATE).read_text())
        check_same_run(run_state["config"], self.config, path)
        # Before the tensors, for it tells which there are: within a growth window, gradients are among them.
        self.topology.resume(run_state["topology"])
        state = self._state()
        check_same_tensors(path, state)
        dcp.load(state, checkpoint_id=path)
        self._write(state)
        write_scalars(self.backend.optimizer, run_state["optimizer_scalars"])
        return self.topology.steps

    def _publish(self, partial: Path, final: Path) -> None:
        run_state = {
            "topology": self.topology.counters(),
            "optimizer_scalars": scalars(self.backend.optimizer),
            "config": to_dict(self.config),
        }
        (partial / RUN_STATE).write_text(json.dumps(run_state, indent=2))
        partial.rename(final)
        pointer = self.directory / f"{LATEST}.new"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, self.directory / LATEST)

    def _state(self) -> dict[str, DTensor]:
        """Every tensor of the run's state by name, flat, sharded over the ranks."""
        mesh = init_device_mesh(next(self.backend.model.parameters()).device.type, (dist.get_world_size(),))
        access = self.backend.access
        state: dict[str, DTensor] = {}
        for name, parameter in self.backend.model.named_parameters():
            state[f"model/{name}"] = _sharded(access.read(parameter), mesh)
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    state[f"optimizer/{moment}/{name}"] = _sharded(access.read_moment(parameter, moment), mesh)
        for name, (chunk, numel) in self.topology.state().items():
            state[f"topology/{name}"] = _from_chunk(chunk, numel, mesh)
        return state

    def _write(self, state: dict[str, DTensor]) -> None:
        access = self.backend.access
        for name, parameter in self.backend.model.named_parameters():
            value = state[f"model/{name}"].full_tensor()
            shape = access.read(parameter).shape
            access.write(parameter, value.view(shape))
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    full = state[f"optimizer/{moment}/{name}"].full_tensor()
                    access.write_moment(parameter, moment, full.view(shape))
        self.topology.load_state({name: state[f"topology/{name}"].to_local() for name in self.topology.state()})


def latest(directory: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    pointer = directory / LATEST
    if not pointer.exists():
        raise CheckpointError(f"{directory} holds no checkpoint to resume from; start the run without --resume")
    path = directory / pointer.read_text().strip()
    if not (path / RUN_STATE).exists():
        raise CheckpointError(f"{pointer} names {path.name}, which is not a complete checkpoint; write another's name into it")
    return path


def check_same_run(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Refuses to go on with a recipe other than the checkpoint's.

    Raises:
        CheckpointError: names the field and both values.
    """
    now, then = flatten_config(to_dict(config)), flatten_config(saved)
    for field in now:
        if field.startswith(FIXED_FIELDS) and then.get(field) != now[field]:
            raise CheckpointError(
                f"{path} was saved with {field} = {then.get(field)!r}, not {now[field]!r}; restore it, or start a new run"
            )


def check_same_tensors(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuses a checkpoint whose tensors aren't this run's, by name and size.

    Args:
        path: of the checkpoint.
        state: this run's tensors.
        prefix: of the names to compare; the checkpoint may hold any others.

    Raises:
        CheckpointError: names a tensor.
    """
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    saved = {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    remedy = "use the config that it was saved with"
    for name in sorted(name for name in saved.keys() | state.keys() if name.startswith(prefix)):
        if name not in saved or name not in state:
            where = "checkpoint" if name in saved else "model"
            raise CheckpointError(f"{path}: {name} is only in the {where}; {remedy}")
        if saved[name] != state[name].shape:
            sizes = f"{saved[name].numel()} elements, the model's {state[name].numel()}"
            raise CheckpointError(f"{path}: {name} has {sizes}; {remedy}")


def _sharded(full: Tensor, mesh: DeviceMesh) -> DTensor:
    """A full tensor, which all ranks hold, as a flat one of which each keeps its chunk."""
    flat = full.flatten()
    return _from_chunk(rank_chunk(flat, dist.get_rank(), dist.get_world_size()).clone(), flat.numel(), mesh)


def _from_chunk(chunk: Tensor, numel: int, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(chunk, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))
