"""One save, from chunks in CPU memory to a complete checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    """What is saved.

    Attributes:
        step: the optimizer step after which it was taken.
        tensors: by name, what this rank saves, in CPU memory.
        run_state: what isn't a tensor, for JSON.
    """

    step: int
    tensors: Mapping[str, Tensor]
    run_state: Mapping[str, Any]


class PlainSpokenWriter(dcp.FileSystemWriter):
    """Tells why a file couldn't be written: torch hides the system's error behind one of its own archive format."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _cause(error) from error


def write_checkpoint(snapshot: Snapshot, directory: CheckpointDirectory, group: dist.ProcessGroup, *, may_create: bool) -> Path:
    """Writes a checkpoint. A collective of the group; what fails on one rank fails on all.

    Args:
        snapshot: see there.
        directory: seen by all ranks.
        group: on gloo, and used by nothing else meanwhile.
        may_create: see :meth:`CheckpointDirectory.other_owner`.

    Returns:
        The complete checkpoint.

    Raises:
        CheckpointError: a file can't be written, or another start of the run saves here; what there was before is as it was.
    """
    rank = dist.get_rank(group)
    where = directory.path / f"step-{snapshot.step:08d}"
    partial: Path | None = None
    try:
        _check_owner(directory, group, may_create)
        partial = on_main_rank(lambda: directory.begin(snapshot.step), group)
        _write_tensors(snapshot.tensors, partial, group)
        digests = on_all_ranks(lambda: _finish_files(snapshot, partial, rank), group)
        files = {name: found for own in digests for name, found in own.items()}
        _check_owner(directory, group, may_create)
        return on_main_rank(lambda: directory.publish(partial, files), group)
    except CheckpointError as error:
        if rank == 0 and partial is not None:
            directory.discard(partial)
        # Who has lost the directory has lost files in it too, so that tells more than the error does.
        problem = on_main_rank(lambda: _owner_problem(directory), group) or f"{error}; free or mount the disk"
        raise CheckpointError(f"can't save {where}: {problem}") from error


def _check_owner(directory: CheckpointDirectory, group: dist.ProcessGroup, may_create: bool) -> None:
    other = on_main_rank(lambda: directory.other_owner(may_create=may_create), group)
    if other is not None:
        raise CheckpointError(f"{other} saves here now")


def _owner_problem(directory: CheckpointDirectory) -> str | None:
    try:
        other = directory.other_owner(may_create=False)
    except OSError:
        return None
    return None if other is None else f"{other} has begun to save this run here; end one of the two"


def _write_tensors(tensors: Mapping[str, Tensor], partial: Path, group: dist.ProcessGroup) -> None:
    try:
        dcp.save(dict(tensors), storage_writer=PlainSpokenWriter(partial), process_group=group)
    except CheckpointException as error:
        # It says nothing by itself, and isn't an Exception.
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{reason} (on rank {rank})") from error


def _cause(error: BaseException) -> BaseException:
    """The system's error that led to another; that one where there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _finish_files(snapshot: Snapshot, partial: Path, rank: int) -> dict[str, FileDigest]:
    """Digests of the files that a rank has written; the main rank also writes those that there is one of."""
    # This is how torch.distributed.checkpoint names them.
    own = set(partial.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        write_durably(partial / RUN_STATE, json.dumps(snapshot.run_state, indent=2) + "\n")
        own |= {path for path in partial.iterdir() if path.suffix != ".distcp"}
    return {path.name: digest(path) for path in own}
