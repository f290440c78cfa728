"""All ranks stop after the same step when one of them is asked to."""

from __future__ import annotations

import torch
import torch.distributed as dist

from svite_scale.runtime.signals import StopSignals

EXIT_PREEMPTED = 85
"""Exit status of a run that was asked to stop, and saved: start it again with ``--resume``."""

STOP_LOOK = "preemption/stop_look"
"""In the store: at which look all ranks stop, once a rank was asked to."""


class Preempted(Exception):
    """The run was asked to stop, and has saved its state after ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal, saved after step {step}; go on with --resume")
        self.step = step


def never() -> bool:
    """A run without signals stops at its end alone."""
    return False


class StopAgreement:
    """Whether to stop after a step, with the same answer on every rank, and no collective.

    Each rank looks into the store before the first step and after each one, and counts its looks. A rank that was asked to
    stop names its next look, before it begins the step up to that. Another rank can't end this step without it, for each step
    reduces gradients over all ranks; so at that look it finds the name. Hence all ranks stop at the same look, and one step
    after the first to see its signal.

    On CUDA the host runs ahead of the device, so a step's end on the host tells nothing of other ranks. There each look first
    waits until the device has ended the step before, which leaves one step to run ahead, and it is the look after the next that
    a rank names.
    """

    def __init__(self, signals: StopSignals, store: dist.Store, device: torch.device) -> None:
        """``store`` is one that all ranks share."""
        self.signals, self.store = signals, store
        self._run_ahead = 1 if device.type == "cuda" else 0
        self._previous_step: torch.cuda.Event | None = None
        self._looks = 0
        self._stop_look: int | None = None

    def __call__(self) -> bool:
        """One look; whether to stop. Costs one request to the store."""
        self._looks += 1
        if self._run_ahead:
            self._wait_for_previous_step()
        if self._stop_look is None:
            self._stop_look = self._named_look()
        return self._stop_look is not None and self._looks >= self._stop_look

    def _named_look(self) -> int | None:
        if self.signals.received:
            # The first rank that names a look decides; it's what the others get back.
            return int(self.store.compare_set(STOP_LOOK, "", str(self._looks + 1 + self._run_ahead)))
        return int(self.store.get(STOP_LOOK)) if self.store.check([STOP_LOOK]) else None

    def _wait_for_previous_step(self) -> None:
        if self._previous_step is not None:
            self._previous_step.synchronize()
        self._previous_step = torch.cuda.Event()
        self._previous_step.record()
