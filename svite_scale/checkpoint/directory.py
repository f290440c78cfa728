"""The directory ``checkpoints/`` of a run: names, what is kept, and the newest valid one."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from svite_scale.checkpoint.collective_io import on_all_ranks, on_main_rank
from svite_scale.checkpoint.manifest import FileDigest, problem_of, write_manifest
from svite_scale.runtime.durable import make_directory, replace_durably, sync, write_durably
from svite_scale.sparsity.sharding import rank_and_size

CHECKPOINTS = "checkpoints"
"""What it is called in a run directory."""

LATEST = "latest"
"""A file that names the checkpoint saved last, for people and scripts: a run that resumes looks for the newest valid one."""

OWNER = "owner"
"""A file that names the start of the run that saves here, the last one that began to."""

RUN_STATE = "run.json"
PARTIAL = ".partial"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")

logger = logging.getLogger("svite_scale")


class CheckpointDirectory:
    """Local file operations, for one rank at a time; all raise ``OSError``.

    Several starts of a run may reach one directory, when a scheduler has started a job again while it still ends somewhere.
    Then the last one that began to save is the owner, and the others may not publish. What each writes has a name of its own
    until it is complete, and what is removed is renamed first, so that nobody goes on writing to it.

    Attributes:
        path: of ``checkpoints/``.
        keep_last: how many of the newest are kept; None keeps all.
        keeps: whether that of a step is kept, however old; None keeps none for its step.
    """

    def __init__(self, path: Path, keep_last: int | None = None, keeps: Callable[[int], bool] | None = None) -> None:
        self.path, self.keep_last, self.keeps = path, keep_last, keeps
        self._token = uuid4().hex[:8]
        self._is_owner = False

    def named(self) -> list[Path]:
        """All that have a checkpoint's name, valid or not, the newest first; none where there is no such directory."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted((self.path / name for name in names if NAME.fullmatch(name)), key=_age, reverse=True)

    def other_owner(self, *, may_create: bool) -> str | None:
        """The first call makes this start of the run the owner; a later one tells who else has become it, if anybody has.

        Args:
            may_create: whether ``checkpoints/`` may be missing. If one was there before, it has vanished, and perhaps the disk.
        """
        if may_create:
            make_directory(self.path)
        owner = self.path / OWNER
        if not self._is_owner:
            job = os.environ.get("SLURM_JOB_ID")
            process = f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
            write_durably(owner, f"{self._token} {process}\n")
            self._is_owner = True
            return None
        token, _, process = owner.read_text().strip().partition(" ")
        return None if token == self._token else process

    def begin(self, step: int) -> Path:
        """An empty directory, for the owner to write the checkpoint of a step to; what interrupted saves left is removed."""
        for leftover in self.path.glob(f"*{PARTIAL}"):
            self._remove(leftover)
        name, repeat = f"step-{step:08d}", 1
        # A torn checkpoint of the same step stays where it is.
        while (self.path / name).exists():
            repeat += 1
            name = f"step-{step:08d}-{repeat}"
        partial = self.path / f"{name}.{self._token}{PARTIAL}"
        partial.mkdir()
        return partial

    def publish(self, partial: Path, files: Mapping[str, FileDigest]) -> Path:
        """Gives a directory that :meth:`begin` made, and whose files are written, its name; then removes old checkpoints.

        For the owner. What fails after it is saved is a warning.
        """
        write_manifest(partial, files)
        final = partial.with_name(partial.name.partition(".")[0])
        partial.rename(final)
        sync(self.path)
        try:
            replace_durably(self.path / LATEST, f"{final.name}\n")
            self._prune(newest=final)
        except OSError as error:
            logger.warning("%s is saved, but %s isn't up to date, or an old checkpoint is left: %s", final, LATEST, error)
        return final

    def discard(self, partial: Path) -> None:
        """Removes what a failed save has written, as far as that is possible."""
        shutil.rmtree(partial, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Removes complete checkpoints that are neither among the newest nor of a step to keep; torn ones stay."""
        if self.keep_last is None:
            return
        complete = [path for path in self.named() if problem_of(path, share=slice(0)) is None]
        for path in complete[self.keep_last :]:
            if path != newest and (self.keeps is None or not self.keeps(step_of(path))):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Says so where it can't: that is no reason not to save."""
        try:
            # Renamed first: a kill meanwhile must not leave a checkpoint that looks torn, nor another start publish it.
            shutil.rmtree(path.rename(self.path / f"gone.{uuid4().hex[:8]}{PARTIAL}"))
        except OSError as error:
            logger.warning("can't remove %s: %s", path, error)


def newest_valid(directory: CheckpointDirectory, group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint whose files are all as they were written, the same on all ranks; None where there is none.

    Torn ones are named in one line each, and left in place. A collective, in which ranks share the reading.

    Raises:
        CheckpointError: the directory can't be read.
    """
    rank, world_size = rank_and_size(group)
    for path in on_main_rank(directory.named, group):

        def problem(path: Path = path) -> str | None:
            return problem_of(path, share=slice(rank, None, world_size))

        problems = [found for found in on_all_ranks(problem, group) if found is not None]
        if not problems:
            return path
        if rank == 0:
            logger.warning("checkpoint %s is skipped: %s", path, problems[0])
    return None


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return _age(path)[0]


def _age(path: Path) -> tuple[int, int]:
    """Step and repetition, in the order of which checkpoints were saved."""
    found = NAME.fullmatch(path.name)
    assert found is not None, f"{path} has no checkpoint's name"
    return int(found[1]), int(found[2] or 1)
