"""What the run does about steps whose gradient isn't finite, and about losses that spike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svite_scale.errors import DivergedError
from svite_scale.train.options import GuardConfig

Newest = Callable[[], Path | None]
"""Looks up the last good checkpoint; a collective."""

REMEMBERED_LOSSES = 16
"""Losses of the metrics whose mean tells what is usual; until there are as many, nothing is a spike."""


def spread_nonfinite(loss: Tensor) -> Tensor:
    """The same scalar loss, with a gradient that isn't finite where the loss isn't: then the norm tells all ranks of both."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Guard:
    """Counts what went wrong. All ranks count alike, for what they count by was reduced over them. No collective.

    Attributes:
        skipped_steps: steps of this run that changed nothing.
        rollbacks: times that the run went back to a checkpoint.
        data_offset: steps' worth of batches left out by them: step s trains on the data of step s + data_offset.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped_steps = self.rollbacks = self.data_offset = 0
        self._skipped_in_row = 0
        self._losses: list[float] = []

    def end_step(self, step: int, applied: bool, newest: Newest) -> None:
        """Counts a step.

        Args:
            step: optimizer steps done, with this one.
            applied: whether it changed the weights.
            newest: called for the checkpoint to be named.

        Raises:
            DivergedError: as many in a row weren't applied as the config allows.
        """
        if applied:
            self._skipped_in_row = 0
            return
        self.skipped_steps += 1
        self._skipped_in_row += 1
        limit = self.config.max_nonfinite_steps
        if limit is not None and self._skipped_in_row >= limit:
            raise DivergedError(
                f"loss or gradient weren't finite in {limit} steps in a row, up to step {step} (guard.max_nonfinite_steps); "
                f"{last_good(newest())}; go on from it with a train.clip_grad_norm, or start anew with a lower optimizer.lr"
            )

    def is_spike(self, step: int, loss: float | None, newest: Newest) -> bool:
        """Whether the metrics' mean loss is too far above those before; None where no step was applied.

        Raises:
            DivergedError: it is, and the run has gone back as often as the config allows, or has nothing to go back to.
        """
        if self.config.spike_factor is None or loss is None:
            return False
        usual = sum(self._losses) / len(self._losses) if len(self._losses) == REMEMBERED_LOSSES else float("inf")
        if loss <= self.config.spike_factor * usual:
            self._losses = [*self._losses, loss][-REMEMBERED_LOSSES:]
            return False
        path = newest()
        if path is None or self.rollbacks == self.config.max_rollbacks:
            raise DivergedError(
                f"the loss spiked from {usual:.4g} to {loss:.4g} at step {step} (guard.spike_factor), after {self.rollbacks} "
                f"rollbacks (guard.max_rollbacks); {last_good(path)}; start anew with a lower optimizer.lr"
            )
        return True

    def roll_back(self, from_step: int, to_step: int) -> None:
        """The run has gone back; the batches that the steps in between were trained on aren't used again."""
        self.rollbacks += 1
        self.data_offset += from_step - to_step

    def metrics(self) -> dict[str, float]:
        rollbacks = {} if self.config.spike_factor is None else {"rollbacks": self.rollbacks}
        return {"skipped_steps": self.skipped_steps, **rollbacks}

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts as plain numbers, for a checkpoint."""
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_row": self._skipped_in_row,
            "rollbacks": self.rollbacks,
            "data_offset": self.data_offset,
            "losses": self._losses,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the counts to those of :meth:`state_dict`."""
        self.skipped_steps, self._skipped_in_row = state_dict["skipped_steps"], state_dict["skipped_in_row"]
        self.rollbacks, self.data_offset = state_dict["rollbacks"], state_dict["data_offset"]
        self._losses = list(state_dict["losses"])


def last_good(path: Path | None) -> str:
    return "there is no checkpoint" if path is None else f"the last good checkpoint is {path}"
