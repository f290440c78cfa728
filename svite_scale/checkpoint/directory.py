"""The directory ``checkpoints/`` of a run: names, ownership, removal, and the newest valid checkpoint."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from svite_scale.checkpoint.collective_io import on_all_ranks, on_main_rank
from svite_scale.checkpoint.manifest import FileDigest, problem_of, write_manifest
from svite_scale.runtime.durable import make_directory, sync, write_durably
from svite_scale.sparsity.sharding import rank_and_size

CHECKPOINTS = "checkpoints"
"""Its name in a run directory."""

OWNER = "owner"
"""A file that names the process that saves here: of those that ever saved, the one that began last."""

RUN_STATE = "run.json"
PARTIAL = ".partial"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")

logger = logging.getLogger("svite_scale")


class CheckpointDirectory:
    """Local file operations, for one rank at a time. All of them raise ``OSError``.

    Two starts of one run may save here at the same time: a scheduler may start a job again while processes of its last start
    still run on a node that it has lost. The start that began to save last owns the directory, and the other may not publish.
    A checkpoint has a name of its start's own until it is complete, and is renamed before it is removed, so no start writes to
    the other's files.

    Attributes:
        path: of ``checkpoints/``.
        keep_last: number of the newest checkpoints to keep; None keeps all.
        keeps: whether the checkpoint of a step is kept for good; None keeps none for its step.
        may_create: whether :meth:`claim` makes a missing directory. False once a checkpoint was loaded from it: if it is
            missing then, perhaps the disk is.
    """

    def __init__(self, path: Path, keep_last: int | None = None, keeps: Callable[[int], bool] | None = None) -> None:
        self.path, self.keep_last, self.keeps = path, keep_last, keeps
        self.may_create = True
        self._token = uuid4().hex[:8]
        self._has_claimed = False

    def named(self) -> list[Path]:
        """Returns everything that has a checkpoint's name, valid or not, the newest first; empty without the directory."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted((self.path / name for name in names if NAME.fullmatch(name)), key=_age, reverse=True)

    def claim(self) -> None:
        """Makes this start of the run the owner. A later call checks that it still is.

        Raises:
            OSError: another start has become the owner.
        """
        if self._has_claimed:
            if (owner := self.other_owner()) is not None:
                raise OSError(f"{owner} owns it now")
            return
        if self.may_create:
            make_directory(self.path)
        job = os.environ.get("SLURM_JOB_ID")
        process = f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
        write_durably(self.path / OWNER, f"{self._token} {process}\n")
        self._has_claimed = True

    def other_owner(self) -> str | None:
        """Returns the process that owns the directory in place of this start; None while this start does."""
        token, _, process = (self.path / OWNER).read_text().strip().partition(" ")
        return None if token == self._token else process

    def begin(self, step: int) -> Path:
        """Makes an empty directory for the checkpoint of a step, and removes what interrupted saves left. For the owner."""
        for leftover in self.path.glob(f"*{PARTIAL}"):
            self._remove(leftover)
        # Older versions named the newest checkpoint there; it would be out of date from now on.
        (self.path / "latest").unlink(missing_ok=True)
        name, repeat = f"step-{step:08d}", 1
        # An incomplete or corrupt checkpoint of this step stays where it is.
        while (self.path / name).exists():
            repeat += 1
            name = f"step-{step:08d}-{repeat}"
        partial = self.path / f"{name}.{self._token}{PARTIAL}"
        partial.mkdir()
        return partial

    def publish(self, partial: Path, files: Mapping[str, FileDigest]) -> Path:
        """Gives a checkpoint whose files are all written its name, then removes old checkpoints. For the owner.

        Args:
            partial: made by :meth:`begin`.
            files: by name in it.

        Returns:
            The complete checkpoint. Once it is there, a failure to remove old ones is only a warning.
        """
        write_manifest(partial, files)
        final = partial.with_name(partial.name.partition(".")[0])
        partial.rename(final)
        sync(self.path)
        try:
            self._prune(newest=final)
        except OSError as error:
            logger.warning("%s is saved, but an old checkpoint can't be removed: %s", final, error)
        return final

    def _prune(self, newest: Path) -> None:
        """Removes complete checkpoints that are neither among the newest nor of a step to keep. Incomplete ones stay."""
        if self.keep_last is None:
            return
        complete = [path for path in self.named() if problem_of(path, to_read=slice(0)) is None]
        for path in complete[self.keep_last :]:
            if path != newest and (self.keeps is None or not self.keeps(_age(path)[0])):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Removes a directory, or warns: to fail to remove one is no reason not to save."""
        try:
            # Renamed first: a kill halfway must not leave what looks like a checkpoint, nor may another start publish it.
            shutil.rmtree(path.rename(self.path / f"gone.{uuid4().hex[:8]}{PARTIAL}"))
        except OSError as error:
            logger.warning("can't remove %s: %s", path, error)


def newest_valid(directory: CheckpointDirectory, group: dist.ProcessGroup | None = None) -> Path | None:
    """Returns the newest checkpoint whose files are all as they were written, the same on all ranks; None if there is none.

    Incomplete and corrupt checkpoints are named in one line each, and left in place. A collective; ranks share the reading.

    Raises:
        CheckpointError: the directory can't be read.
    """
    rank, world_size = rank_and_size(group)
    for path in on_main_rank(directory.named, group):
        find_problem = partial(problem_of, path, to_read=slice(rank, None, world_size))
        problems = [found for found in on_all_ranks(find_problem, group) if found is not None]
        if not problems:
            return path
        if rank == 0:
            logger.warning("checkpoint %s is skipped: %s", path, problems[0])
    return None


def _age(path: Path) -> tuple[int, int]:
    """Returns step and repetition, by which checkpoints are sorted from old to new."""
    found = NAME.fullmatch(path.name)
    assert found is not None, f"{path} has no checkpoint's name"
    return int(found[1]), int(found[2] or 1)
