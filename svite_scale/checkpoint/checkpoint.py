"""Saving and loading one run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from svite_scale.checkpoint.compatibility import (
    check_same_run,
    check_same_samples,
    check_same_tensors,
    names_on_disk,
    versions,
    warn_of_other_versions,
)
from svite_scale.checkpoint.directory import CheckpointDirectory, newest_valid
from svite_scale.checkpoint.load import TensorReader, read_run_state
from svite_scale.checkpoint.save import Snapshot, write_checkpoint
from svite_scale.checkpoint.state import MOMENTS, RunParts, RunTensors
from svite_scale.config.load import to_dict
from svite_scale.config.schema import Config
from svite_scale.engines.moments import scalars, write_scalars
from svite_scale.errors import CheckpointError

logger = logging.getLogger("svite_scale")


class Checkpoint:
    """Saves and loads one run. Every rank makes one; all methods are collectives, except :meth:`close`.

    A save copies this rank's chunks to CPU memory. Then a thread writes them, through a process group of its own, so that its
    collectives can't mix with those of training.

    Attributes:
        run: what is saved and loaded.
        directory: ``checkpoints/`` of the run directory, shared by all ranks.
        failed_saves: number of failed saves so far, of those that have been waited for or that :meth:`metrics` has seen.
        last_saved: the newest checkpoint that this run has saved or loaded; None before.
    """

    def __init__(self, directory: Path, config: Config, run: RunParts, keeps: Callable[[int], bool] | None = None) -> None:
        """Makes a process group for saving. A collective.

        Args:
            directory: ``checkpoints/`` of the run directory, shared by all ranks; the first save makes it.
            config: of the run.
            run: what to save and load.
            keeps: whether the checkpoint of a step is kept for good; None keeps none for its step.
        """
        self.config, self.run = config, run
        self.directory = CheckpointDirectory(directory, config.checkpoint.keep_last, keeps)
        self.failed_saves = 0
        self.last_saved: Path | None = None
        group = dist.new_group(backend="gloo", group_desc="checkpoints")
        assert isinstance(group, dist.ProcessGroup), "this rank is one of all ranks"
        self._group = group
        self._tensors = RunTensors(run, group)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[tuple[Path, float]] | None = None
        self._saved_step: int | None = None
        self._metrics: dict[str, float] = {}

    def save(self, step: int, *, last: bool = False) -> None:
        """Saves the run's state after an optimizer step, unless it has saved that step since it was started or last loaded.

        Waits first for a save that still runs.

        Args:
            step: optimizer steps done.
            last: the run ends after this save. So it is waited for, and must succeed.

        Raises:
            CheckpointError: a save that was waited for has failed, and ``checkpoint.on_error`` is ``stop`` or this is the last
                save. On all ranks.
        """
        started = time.perf_counter()
        if step != self._saved_step:
            self.wait()
            self._running = self._thread.submit(self._write, self._snapshot(step))
            self._saved_step = step
        if last or not self.config.checkpoint.background:
            self.wait(must_succeed=last)
        self._metrics["checkpoint_stall_ms"] = 1000 * (time.perf_counter() - started)

    def wait(self, *, must_succeed: bool = False) -> None:
        """Waits for a save that still runs, and records its outcome.

        Args:
            must_succeed: a failure is an error, whatever ``checkpoint.on_error`` is.

        Raises:
            CheckpointError: the save has failed. On all ranks.
        """
        running, self._running = self._running, None
        if running is None:
            return
        try:
            self.last_saved, self._metrics["checkpoint_seconds"] = running.result()
        except CheckpointError as error:
            self.failed_saves += 1
            self._saved_step = None
            if must_succeed:
                raise CheckpointError(f"{error}; the last checkpoint of this run is {self.last_saved or 'none'}") from error
            if self.config.checkpoint.on_error == "stop":
                raise
            if dist.get_rank() == 0:
                logger.warning("%s; the run continues (checkpoint.on_error is continue)", error)

    def metrics(self) -> dict[str, float]:
        """Returns what is new since the last call: ``checkpoint_stall_ms``, for which a save kept training waiting;
        ``checkpoint_seconds``, the duration of a save up to the disk. Always ``failed_saves``, the total.

        Raises:
            CheckpointError: as :meth:`save`.
            Exception: the thread failed on this rank, with an error that isn't one of writing files.
        """
        if self._running is not None:
            is_done = self._running.done()
            if is_done and not isinstance(self._running.exception(), CheckpointError | None):
                # A programming error. Other ranks don't know of it and may wait for this rank, so don't wait for them.
                self.wait()
            done = torch.tensor(int(is_done))
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                self.wait()
        metrics, self._metrics = self._metrics, {}
        return {**metrics, "failed_saves": self.failed_saves}

    def newest_valid(self) -> Path | None:
        """Returns the newest checkpoint that can be loaded, after waiting for a save that still runs; None if there is none.

        Incomplete and corrupt checkpoints are named in one line each, and left in place.

        Raises:
            CheckpointError: as :meth:`save`; or a file can't be read.
        """
        self.wait()
        return newest_valid(self.directory, self._group)

    def load_newest(self) -> int:
        """Loads :meth:`newest_valid`. The optimizer's state must exist (see ``Backend.init_optimizer_state``).

        Returns:
            The optimizer step after which it was saved.

        Raises:
            CheckpointError: there is no checkpoint, or it belongs to another model or recipe.
        """
        path = self.newest_valid()
        if path is None:
            problem = "that is valid" if self.directory.named() else "to resume from"
            raise CheckpointError(f"{self.directory.path} holds no checkpoint {problem}; restore one, or start a new run")
        return self._load(path)

    def close(self) -> None:
        """Waits for a save that still runs, and ignores its outcome. The last call. Local, and safe after an error."""
        self._thread.shutdown()
        dist.destroy_process_group(self._group)

    @torch.no_grad()
    def _load(self, path: Path) -> int:
        saved, run = read_run_state(path), self.run
        check_same_run(saved["config"], self.config, path)
        # The first checkpoints didn't name their samples.
        if "samples" in saved:
            check_same_samples(saved["samples"], run.samples, path)
        if dist.get_rank() == 0:
            warn_of_other_versions(saved["versions"], path)
        # Within a growth window, gradients are among the tensors.
        state = self._tensors.to_load(saved["topology"])
        # An optimizer has no state before its first applied step.
        is_untouched = not saved["optimizer_scalars"]
        moments = {name: state.pop(name).zero_() for name in list(state) if is_untouched and name.startswith(MOMENTS)}
        on_disk = names_on_disk(path, state)
        check_same_tensors(path, on_disk)
        try:
            dcp.load(on_disk, storage_reader=TensorReader(path), process_group=self._group)
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"{path} can't be read: {reason} (on rank {rank})") from error
        self._tensors.write(state | moments, saved["topology"])
        optimizer = run.backend.optimizer
        write_scalars(optimizer, saved["optimizer_scalars"] or dict.fromkeys(scalars(optimizer), 0.0))
        for name, stateful in run.stateful.items():
            stateful.load_state_dict(saved["counts"][name])
        self.last_saved, self.directory.may_create = path, False
        # So that a run that rolled back to this step can save it again, with its new counts.
        self._saved_step = None
        return int(saved["step"])

    def _snapshot(self, step: int) -> Snapshot:
        run = self.run
        run_state: dict[str, Any] = {
            "step": step,
            "topology": run.topology.counters(),
            "counts": {name: stateful.state_dict() for name, stateful in run.stateful.items()},
            "optimizer_scalars": scalars(run.backend.optimizer),
            "samples": run.samples,
            "config": to_dict(self.config),
            "versions": versions(),
        }
        return Snapshot(step, self._tensors.to_save(), run_state)

    def _write(self, snapshot: Snapshot) -> tuple[Path, float]:
        """Writes a snapshot on the thread; returns the checkpoint and the seconds it took."""
        started = time.perf_counter()
        path = write_checkpoint(snapshot, self.directory, self._group)
        return path, time.perf_counter() - started
