"""What this rank is doing, told to the watchdog."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Activity:
    """The step and the phase that this rank is in. All ranks go through the same phases.

    Attributes:
        step: optimizer steps done.
        phase: in words.
        progress: phases entered so far; the rank that is behind has the smallest.
        timed: whether phases take what they usually take: not before the end of the first step, in which kernels and
            DeepSpeed's ops may be compiled.
        leaving: whether training is over, or has failed.
        exit_status: what this process ends with where it hangs, or another rank ends the run.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.progress, self.timed = 0, "starting", 0, False
        self.leaving, self.exit_status = False, 1

    def enter(self, phase: str) -> None:
        """Begins a phase."""
        self.phase = phase
        self.progress += 1

    def leave(self, exit_status: int = 1) -> None:
        """Nothing but the way out is left."""
        self.leaving, self.exit_status = True, exit_status
        self.enter("leaving")

    def end_step(self, step: int) -> None:
        """An optimizer step is done."""
        self.step, self.timed = step, True

    def each(self, items: Iterable[Item], phase: str) -> Iterator[Item]:
        """Passes items on; the work on each is a phase."""
        for item in items:
            self.enter(phase)
            yield item
