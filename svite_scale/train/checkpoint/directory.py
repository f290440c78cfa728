"""The directory ``checkpoints/`` of a run: names, what is kept, and the newest valid one."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from svite_scale.sparsity.sharding import rank_and_size
from svite_scale.train.checkpoint.agreement import on_all_ranks, on_main_rank
from svite_scale.train.checkpoint.manifest import FileDigest, problem_of, sync, write_durably, write_manifest

LATEST = "latest"
"""A file that names the checkpoint saved last, for people and scripts: a run that resumes looks for the newest valid one."""

RUN_STATE = "run.json"
PARTIAL = ".partial"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")

logger = logging.getLogger("svite_scale")


@dataclass(frozen=True)
class CheckpointDirectory:
    """Local file operations, for one rank at a time; all raise ``OSError``.

    Attributes:
        path: of ``checkpoints/``.
        keep_last: how many of the newest are kept; None keeps all.
        keeps: whether that of a step is kept, however old; None keeps none for its step.
    """

    path: Path
    keep_last: int | None = None
    keeps: Callable[[int], bool] | None = None

    def named(self) -> list[Path]:
        """All that have a checkpoint's name, valid or not, the newest first."""
        return sorted((path for path in self.path.glob("step-*") if NAME.fullmatch(path.name)), key=_age, reverse=True)

    def begin(self, step: int, *, may_create: bool) -> Path:
        """An empty directory to write the checkpoint of a step to; what an interrupted save left is removed.

        Args:
            step: optimizer step.
            may_create: whether ``checkpoints/`` may be missing. If one was there before, it has vanished, and perhaps the disk.
        """
        if may_create:
            self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        name, repeat = f"step-{step:08d}", 1
        # A torn checkpoint of the same step stays where it is.
        while (self.path / name).exists():
            repeat += 1
            name = f"step-{step:08d}-{repeat}"
        partial = self.path / f"{name}{PARTIAL}"
        partial.mkdir()
        return partial

    def publish(self, partial: Path, files: Mapping[str, FileDigest]) -> Path:
        """Gives a directory that :meth:`begin` made, and whose files are written, its name; then removes old checkpoints."""
        write_manifest(partial, files)
        final = partial.with_suffix("")
        partial.rename(final)
        sync(self.path)
        pointer = self.path / f"{LATEST}.new"
        write_durably(pointer, final.name)
        os.replace(pointer, self.path / LATEST)
        sync(self.path)
        self._prune()
        return final

    def discard(self, partial: Path) -> None:
        """Removes what a failed save has written, as far as that is possible."""
        shutil.rmtree(partial, ignore_errors=True)

    def _prune(self) -> None:
        """Removes complete checkpoints that are neither among the newest nor of a step to keep; torn ones stay."""
        if self.keep_last is None:
            return
        complete = [path for path in self.named() if problem_of(path, share=slice(0)) is None]
        for path in complete[self.keep_last :]:
            if self.keeps is None or not self.keeps(step_of(path)):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Says so where it can't: the new checkpoint is saved all the same."""
        try:
            # Renamed first: a kill meanwhile must not leave a checkpoint that looks torn.
            shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))
        except OSError as error:
            logger.warning("can't remove the old checkpoint %s: %s", path, error)


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
