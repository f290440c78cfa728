"""Stops all ranks after the same step when one of them receives a signal."""

from __future__ import annotations

import torch
import torch.distributed as dist

from svite_scale.runtime.signals import StopSignals

STOP_CHECK = "preemption/stop_check"
"""Key in the store: the number of the check at which all ranks stop."""


def never() -> bool:
    """Returns False: a run without signals stops only at its end."""
    return False


class StopAgreement:
    """Decides after each step whether to stop. All ranks decide the same, without a collective.

    Every rank checks the store before the first step and after each step. The first rank that receives a signal writes to the
    store at which check all ranks stop: its next one. A step reduces gradients over all ranks, so no rank finishes it before
    the signalled rank has begun it, and by then the store is written. Hence all ranks stop after the same step, one step after
    the signal.

    On CUDA the host runs ahead of the device, so it may finish a step that other ranks haven't begun. There each check first
    waits until the device has finished the previous step. The host then runs ahead by one step at most, and all ranks stop one
    check later.
    """

    def __init__(self, signals: StopSignals, store: dist.Store, device: torch.device) -> None:
        """``store`` is one that all ranks share."""
        self.signals, self.store = signals, store
        self._run_ahead = 1 if device.type == "cuda" else 0
        self._previous_step: torch.cuda.Event | None = None
        self._checks = 0
        self._stop_check: int | None = None

    def __call__(self) -> bool:
        """Checks once; returns whether to stop. Costs one request to the store."""
        self._checks += 1
        if self._run_ahead:
            self._wait_for_previous_step()
        if self._stop_check is None:
            self._stop_check = self._agreed_check()
        return self._stop_check is not None and self._checks >= self._stop_check

    def _agreed_check(self) -> int | None:
        """Returns the number of the check at which all ranks stop; None while no rank has received a signal."""
        if self.signals.received:
            # The first rank to write decides: the others get its number back.
            return int(self.store.compare_set(STOP_CHECK, "", str(self._checks + 1 + self._run_ahead)))
        return int(self.store.get(STOP_CHECK)) if self.store.check([STOP_CHECK]) else None

    def _wait_for_previous_step(self) -> None:
        if self._previous_step is not None:
            self._previous_step.synchronize()
        self._previous_step = torch.cuda.Event()
        self._previous_step.record()
