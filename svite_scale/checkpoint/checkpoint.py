"""Saving and loading one run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

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
from svite_scale.checkpoint.directory import CheckpointDirectory, newest_valid, step_of
from svite_scale.checkpoint.load import TensorReader, read_run_state
from svite_scale.checkpoint.save import Snapshot, write_checkpoint
from svite_scale.checkpoint.state import MOMENTS, RunTensors, WeightAverage
from svite_scale.config.load import to_dict
from svite_scale.config.schema import Config
from svite_scale.engines.backend import Backend
from svite_scale.engines.moments import scalars, write_scalars
from svite_scale.errors import CheckpointError
from svite_scale.sparsity.topology.engine import TopologyEngine

logger = logging.getLogger("svite_scale")


class Counts(Protocol):
    """Counts something, alike on all ranks, that goes on where a run resumes."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""

    def resume(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""


class Checkpoint:
    """Saves and loads one run's state. Every rank makes one; all methods are collectives.

    A save copies this rank's chunks to CPU memory; then a thread writes them, through a process group of its own, so that its
    collectives can't mix with those of training.

    Attributes:
        directory: ``checkpoints/`` of the run directory, seen by all ranks.
        failed_saves: saves that failed so far, of those that were waited for or that :meth:`metrics` has noticed.
        last_saved: the newest checkpoint that this run has saved, or was loaded from, as far as is known; None before.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        backend: Backend,
        topology: TopologyEngine,
        *,
        counts: Mapping[str, Counts],
        samples: Mapping[str, object] | None = None,
        ema: WeightAverage | None = None,
        keeps: Callable[[int], bool] | None = None,
    ) -> None:
        """Args:
        directory: ``checkpoints/`` of the run directory, seen by all ranks; made by the first save.
        config: of the run.
        backend: holds the model and the optimizer.
        topology: holds the step and the statistics.
        counts: by name, what else goes on where it was.
        samples: tells what the run trains on, for JSON, which a resumed run must share; None says nothing of it.
        ema: holds the average of the weights, if there is one.
        keeps: whether the checkpoint of a step is kept for good; None keeps none for its step.
        """
        self.config, self.backend, self.topology, self.counts, self.samples = config, backend, topology, counts, samples
        self.directory = CheckpointDirectory(directory, config.checkpoint.keep_last, keeps)
        self.failed_saves = 0
        self.last_saved: Path | None = None
        group = dist.new_group(backend="gloo", group_desc="checkpoints")
        assert isinstance(group, dist.ProcessGroup), "this rank is one of all ranks"
        self._group = group
        self._tensors = RunTensors(backend, topology, ema, group)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[tuple[Path, float]] | None = None
        self._step: int | None = None
        self._metrics: dict[str, float] = {}

    def save(self, step: int, *, wait: bool = False, last: bool = False) -> None:
        """Saves the state after an optimizer step, unless this run has saved that step already.

        After a checkpoint was loaded, its step is saved again, because the run has changed since it was saved first.

        A save that still runs is waited for first.

        Args:
            step: optimizer steps done.
            wait: until it is on the disk, as if ``checkpoint.background`` were false.
            last: the run ends after this save, so it is waited for, and must succeed.

        Raises:
            CheckpointError: a save failed that was waited for, and ``checkpoint.on_error`` is ``stop`` or the save the last.
                On all ranks.
        """
        started = time.perf_counter()
        if self._step != step:
            self._settle()
            snapshot = self._snapshot(step)
            self._step = step
            may_create = self.last_saved is None
            self._running = self._thread.submit(self._write, snapshot, may_create=may_create)
        if wait or last or not self.config.checkpoint.background:
            self._settle(last=last)
        self._metrics["checkpoint_stall_ms"] = 1000 * (time.perf_counter() - started)

    def metrics(self) -> dict[str, float]:
        """What there is to tell since the last call: ``checkpoint_stall_ms``, for how long a save kept training waiting;
        ``checkpoint_seconds``, how long one took until it was on the disk; always ``failed_saves``, all so far.

        Raises:
            CheckpointError: as :meth:`save`.
            Exception: the thread failed on this rank, with an error that isn't one of writing files.
        """
        if self._running is not None:
            is_done = self._running.done()
            if is_done and not isinstance(self._running.exception(), CheckpointError | None):
                # Of a mistake other ranks know nothing, and may wait for this one.
                self._settle()
            done = torch.tensor(int(is_done))
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                self._settle()
        metrics, self._metrics = self._metrics, {}
        return {**metrics, "failed_saves": self.failed_saves}

    def newest_valid(self) -> Path | None:
        """The newest checkpoint that can be loaded, once a save that still runs is done; None where there is none.

        Torn ones are named in one line each, and left in place.

        Raises:
            CheckpointError: as :meth:`save`; or a file can't be read.
        """
        self._settle()
        return newest_valid(self.directory, self._group)

    def load_newest(self) -> int:
        """Loads :meth:`newest_valid`; the optimizer's state must exist (see ``Backend.init_optimizer_state``).

        Returns:
            The optimizer step after which the run resumes.

        Raises:
            CheckpointError: there is none, or it belongs to another model or recipe.
        """
        path = self.newest_valid()
        if path is None:
            problem = "that is whole" if self.directory.named() else "to resume from"
            raise CheckpointError(f"{self.directory.path} holds no checkpoint {problem}; restore one, or start a new run")
        return self._load(path)

    def close(self) -> None:
        """Waits for a save that still runs, whatever comes of it; the last call. Local, and fit for after an error."""
        self._thread.shutdown()
        dist.destroy_process_group(self._group)

    @torch.no_grad()
    def _load(self, path: Path) -> int:
        run_state = read_run_state(path)
        check_same_run(run_state["config"], self.config, path)
        # The first checkpoints told nothing of their samples.
        if "samples" in run_state:
            check_same_samples(run_state["samples"], self.samples, path)
        if dist.get_rank() == 0:
            warn_of_other_versions(run_state["versions"], path)
        # Within a growth window, gradients are among the tensors.
        counters, step = run_state["topology"], step_of(path)
        if counters["steps"] != step:
            raise CheckpointError(f"{path} holds the state after step {counters['steps']}, not {step}; restore its name")
        state = self._tensors.to_load(counters)
        # Optimizers have no state before the first step that is applied.
        is_untouched = not run_state["optimizer_scalars"]
        moments = {name: state.pop(name).zero_() for name in list(state) if is_untouched and name.startswith(MOMENTS)}
        on_disk = names_on_disk(path, state)
        check_same_tensors(path, on_disk)
        try:
            dcp.load(on_disk, storage_reader=TensorReader(path), process_group=self._group)
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"{path} can't be read: {reason} (on rank {rank})") from error
        self._tensors.write(state | moments, counters)
        write_scalars(
            self.backend.optimizer, run_state["optimizer_scalars"] or dict.fromkeys(scalars(self.backend.optimizer), 0.0)
        )
        for name, counts in self.counts.items():
            counts.resume(run_state["counts"][name])
        self.last_saved, self._step = path, None
        return step

    def _snapshot(self, step: int) -> Snapshot:
        run_state: dict[str, Any] = {
            "topology": self.topology.counters(),
            "counts": {name: counts.state() for name, counts in self.counts.items()},
            "optimizer_scalars": scalars(self.backend.optimizer),
            "samples": self.samples,
            "config": to_dict(self.config),
            "versions": versions(),
        }
        return Snapshot(step, self._tensors.to_save(), run_state)

    def _write(self, snapshot: Snapshot, *, may_create: bool) -> tuple[Path, float]:
        """On the thread. Returns the checkpoint and the seconds it took."""
        started = time.perf_counter()
        path = write_checkpoint(snapshot, self.directory, self._group, may_create=may_create)
        return path, time.perf_counter() - started

    def _settle(self, *, last: bool = False) -> None:
        """Waits for a save that still runs, and takes note of what came of it; see :meth:`save`."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            self.last_saved, self._metrics["checkpoint_seconds"] = running.result()
        except CheckpointError as error:
            self.failed_saves += 1
            self._step = None
            if last:
                raise CheckpointError(f"{error}; the last checkpoint of this run is {self.last_saved or 'none'}") from error
            if self.config.checkpoint.on_error == "stop":
                raise
            if dist.get_rank() == 0:
                logger.warning("%s; the run goes on, checkpoint.on_error being continue", error)
