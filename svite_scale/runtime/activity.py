"""The step and the phase that this rank is in, for the watchdog."""

from __future__ import annotations

from typing import Literal

Phase = Literal["starting", "data", "compute", "evaluation", "checkpoint", "leaving"]
"""``starting`` comes before the first step and ``leaving`` after the last one. ``data`` is the wait for a micro-batch,
``compute`` everything from its forward to the topology update, ``evaluation`` one batch of an evaluation, and ``checkpoint``
saving, loading, and writing a line of metrics."""


class Activity:
    """The step and the phase that this rank is in. All ranks enter the same phases in the same order.

    Attributes:
        step: optimizer steps done.
        phase: the phase entered last.
        progress: phases entered so far; the rank that is behind has the smallest number.
        timed: False until the first step is done. In it, kernels and DeepSpeed's ops may be compiled, so phases take long.
        leaving: True once training is over, or has failed.
        exit_status: exit status of this process if it hangs, or if another rank ends the run.
    """

    def __init__(self) -> None:
        self.step, self.progress, self.timed = 0, 0, False
        self.phase: Phase = "starting"
        self.leaving, self.exit_status = False, 1

    def enter(self, phase: Phase) -> None:
        """Begins a phase."""
        self.phase = phase
        self.progress += 1

    def leave(self, exit_status: int = 1) -> None:
        """Begins the last phase, in which this process only closes things and ends."""
        self.leaving, self.exit_status = True, exit_status
        self.enter("leaving")

    def end_step(self, step: int) -> None:
        """Records that ``step`` optimizer steps are done."""
        self.step, self.timed = step, True
