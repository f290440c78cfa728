"""The guard against gradients that aren't finite and losses that spike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svite_scale.errors import DivergedError
from svite_scale.train.options import GuardConfig

Newest = Callable[[], Path | None]
"""Returns the last good checkpoint. A collective."""

REMEMBERED_LOSSES = 16
"""Number of losses in the metrics whose mean is the usual loss. Before there are so many, nothing is a spike."""


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Returns the same scalar loss; its gradient isn't finite if the loss isn't. So the norm of the gradient shows both."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Guard:
    """Counts skipped steps and rollbacks. All ranks count alike, because what they count was reduced over all ranks.

    Attributes:
        skipped_steps: steps of this run that changed nothing.
        rollbacks: how often the run returned to a checkpoint.
        data_offset: steps whose batches the rollbacks left out: step s trains on the data of step s + data_offset.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped_steps = self.rollbacks = self.data_offset = 0
        self._skipped_in_row = 0
        self._losses: list[float] = []

    @property
    def skips_nonfinite(self) -> bool:
        """True if steps are skipped whose loss or gradient isn't finite."""
        return self.config.max_nonfinite_steps is not None

    def watch(self, loss: Tensor) -> Tensor:
        """Returns the loss to call backward on, a scalar of the same value."""
        return spread_nonfinite(loss) if self.skips_nonfinite else loss

    def end_step(self, step: int, applied: bool, newest: Newest) -> None:
        """Counts one optimizer step.

        Args:
            step: optimizer steps done, with this one.
            applied: True if the step changed the weights.
            newest: called for the checkpoint that the error names.

        Raises:
            DivergedError: the last ``guard.max_nonfinite_steps`` steps weren't applied.
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
                f"{last_good(newest())}; resume from it with a train.clip_grad_norm, or start again with a lower optimizer.lr"
            )

    def is_spike(self, step: int, loss: float | None, newest: Newest) -> bool:
        """Returns True if a loss of the metrics is too far above the losses before it.

        Args:
            step: optimizer steps done.
            loss: mean loss since the last line of metrics; None if no step was applied.
            newest: called for the checkpoint to return to.

        Raises:
            DivergedError: the loss is a spike, and there is no checkpoint or no rollback left.
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
                f"rollbacks (guard.max_rollbacks); {last_good(path)}; start again with a lower optimizer.lr"
            )
        return True

    def roll_back(self, from_step: int, to_step: int) -> None:
        """Counts a rollback. The batches of the steps in between aren't used again."""
        self.rollbacks += 1
        self.data_offset += from_step - to_step

    def metrics(self) -> dict[str, float]:
        """Returns the counts, by name."""
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
    """Returns the part of a message that names the last good checkpoint."""
    return "there is no checkpoint" if path is None else f"the last good checkpoint is {path}"
