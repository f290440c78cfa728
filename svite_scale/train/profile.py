"""A trace of some optimizer steps, by torch's profiler."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from svite_scale.errors import ConfigError
from svite_scale.runtime.durable import make_directory

OPTION = "--profile"
TRACES = "profile"
"""Name of the folder of traces in a run directory."""

logger = logging.getLogger("svite_scale")


class StepProfiler:
    """Writes a trace of some optimizer steps of this rank. A context around all steps; does nothing without steps to trace.

    Attributes:
        note: says where the trace goes, and how to open it, or why there is none; empty if there are no steps to trace.
    """

    def __init__(self, steps: range | None, folder: Path, rank: int, *, done: int, last_step: int) -> None:
        """Prepares the trace.

        Args:
            steps: the steps to trace, counted from 1; None traces nothing.
            folder: of the traces of all ranks; is made when it is needed.
            rank: of this process.
            done: steps that are done already.
            last_step: the last step of the run.

        Raises:
            ConfigError: the run has no such steps.
        """
        self._profile: profile | None = None
        self.note = ""
        if steps is None:
            return
        self._first, self._last, self._done = steps[0], steps[-1], done
        name = f"{self._first}-{self._last}"
        if self._last > last_step:
            raise ConfigError(OPTION, name, f"goes beyond the last step, {last_step}", "name steps of the run")
        if self._first <= done:  # a requeued job gives the same command again
            self.note = f"no trace: step {self._first} of {OPTION} {name} is done already"
            return
        self._path = folder / f"steps-{name}.rank-{rank}.json.gz"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.note = f"a trace of steps {name} goes into {folder}, a file for each rank; open one at https://ui.perfetto.dev"
        self._profile = profile(activities=activities, schedule=self._action, on_trace_ready=self._save)
        self._profile.step_num = done + 1  # the trace names steps by this number

    def end_step(self) -> None:
        """Records that an optimizer step is done."""
        if self._profile is not None:
            self._profile.step()

    def _action(self, step: int) -> ProfilerAction:
        """Returns what the profiler does in a step. It asks for the first one as 0."""
        step = step or self._done + 1
        if step == self._last:
            return ProfilerAction.RECORD_AND_SAVE
        if self._first <= step < self._last:
            return ProfilerAction.RECORD
        # The profiler's own start takes time, so it is started one step earlier.
        return ProfilerAction.WARMUP if step == self._first - 1 else ProfilerAction.NONE

    def _save(self, finished: profile) -> None:
        """Writes the trace. A disk that doesn't take it doesn't end the run."""
        try:
            make_directory(self._path.parent)
            finished.export_chrome_trace(str(self._path))
        except OSError as error:
            logger.warning("%s can't be written (%s); the run continues without it", self._path, error)

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.stop()


def parse_steps(text: str) -> range:
    """Returns the steps of ``"12"`` or ``"10-12"``.

    Raises:
        ConfigError: the text is neither.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,17})(?:-([1-9][0-9]{0,17}))?", text)
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not steps:
        raise ConfigError(OPTION, text, "is neither a step nor a range of steps", "give 12 or 10-12, say")
    return steps
