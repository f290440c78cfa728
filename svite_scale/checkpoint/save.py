"""One save, from chunks in CPU memory to a complete checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from svite_scale.checkpoint.collective_io import on_all_ranks, on_main_rank
from svite_scale.checkpoint.directory import RUN_STATE, CheckpointDirectory
from svite_scale.checkpoint.manifest import FileDigest, digest
from svite_scale.errors import CheckpointError
from svite_scale.runtime.durable import write_durably


@dataclass(frozen=True)
class Snapshot:
    """The state that one save writes.

    Attributes:
        step: the optimizer step after which it was taken.
        tensors: by name, what this rank saves, in CPU memory.
        run_state: everything that isn't a tensor, for JSON.
    """

    step: int
    tensors: Mapping[str, Tensor]
    run_state: Mapping[str, Any]


def write_checkpoint(snapshot: Snapshot, directory: CheckpointDirectory, group: dist.ProcessGroup) -> Path:
    """Writes a checkpoint. A collective of the group; a failure on one rank is one on all.

    Args:
        snapshot: of this rank.
        directory: shared by all ranks.
        group: on gloo, and used by nothing else meanwhile.

    Returns:
        The complete checkpoint.

    Raises:
        CheckpointError: a file can't be written, or another start of the run owns the directory. Older checkpoints are
            unharmed.
    """
    rank = dist.get_rank(group)
    with _owned(directory, group, snapshot.step):
        partial = on_main_rank(lambda: directory.begin(snapshot.step), group)
        try:
            _write_tensors(snapshot.tensors, partial, group)
            digests = on_all_ranks(lambda: _finish_files(snapshot, partial, rank), group)
            files = {name: found for own in digests for name, found in own.items()}
            on_main_rank(directory.claim, group)
            return on_main_rank(lambda: directory.publish(partial, files), group)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _owned(directory: CheckpointDirectory, group: dist.ProcessGroup, step: int) -> Iterator[None]:
    """Claims the directory for one save. If the save fails, explains why: another owner explains more than the error does,
    because this start has lost its files to it."""
    try:
        on_main_rank(directory.claim, group)
        yield
    except CheckpointError as error:
        owner = on_main_rank(lambda: _other_owner(directory), group)
        lost = f"{owner} has begun to save this run here; end one of the two"
        problem = lost if owner is not None else f"{error}; free or mount the disk"
        raise CheckpointError(f"can't save {directory.path / f'step-{step:08d}'}: {problem}") from error


def _other_owner(directory: CheckpointDirectory) -> str | None:
    try:
        return directory.other_owner()
    except OSError:
        return None


class SystemErrorWriter(dcp.FileSystemWriter):
    """Raises the system's error when a file can't be written. Torch hides it behind an error of its archive format."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _system_error(error) from error


def _system_error(error: BaseException) -> BaseException:
    """Returns the ``OSError`` that caused an error; the error itself if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _write_tensors(tensors: Mapping[str, Tensor], partial: Path, group: dist.ProcessGroup) -> None:
    try:
        dcp.save(dict(tensors), storage_writer=SystemErrorWriter(partial), process_group=group)
    except CheckpointException as error:
        # It has no message of its own, and is a BaseException.
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{reason} (on rank {rank})") from error


def _finish_files(snapshot: Snapshot, partial: Path, rank: int) -> dict[str, FileDigest]:
    """Returns the digests of the files that a rank has written. Rank 0 first writes ``run.json``."""
    # torch.distributed.checkpoint names them so.
    own = set(partial.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        write_durably(partial / RUN_STATE, json.dumps(snapshot.run_state, indent=2) + "\n")
        own |= {path for path in partial.iterdir() if path.suffix != ".distcp"}
    return {path.name: digest(path) for path in own}
