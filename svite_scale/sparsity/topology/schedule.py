"""The schedule of topology updates, and of their drop fraction."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated

from pydantic import Field

from svite_scale.options import options
from svite_scale.sparsity.options import UNIT_DROP_FRACTION, DropSchedule


def cosine(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Returns the drop fraction at ``step``: a half cosine from ``initial`` at step 0 to ``final`` at ``total`` and after.

    Source: the paper's schedule (alpha 0.5 to 0.005), after RigL's cosine with a floor added.
    """
    return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, total)))


def linear(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Returns the drop fraction at ``step``: a line from ``initial`` at step 0 to ``final`` at ``total`` and after."""
    return initial + (final - initial) * _progress(step, total)


def constant(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Returns ``initial``, the drop fraction at any step."""
    return initial


DROP_SCHEDULES: dict[str, Callable[[float, int, int, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}


def _progress(step: int, total: int) -> float:
    return min(max(step / total, 0.0), 1.0) if total > 0 else 1.0


@options
class UpdateSchedule(DropSchedule):
    """Topology updates at every multiple of ``update_every`` optimizer steps, from ``start_step`` to ``stop_fraction`` of
    ``total_steps``.
    """

    total_steps: Annotated[int, Field(ge=1)]
    """Optimizer steps of the whole training."""
    update_every: Annotated[int, Field(ge=1)]
    """Optimizer steps between two updates."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """No update comes before this step, from which the drop fraction falls."""
    unit_drop_fraction: Annotated[float | None, Field(ge=0.0, le=1.0)] = UNIT_DROP_FRACTION
    """``drop_fraction`` of heads and neurons. Theirs ends at ``final_drop_fraction`` too, or stays where it starts if that is
    lower. None moves as large a fraction of them as of the weights."""

    @property
    def stop_step(self) -> int:
        """The last optimizer step after which an update may happen."""
        # As the decimal that was written: in binary the product of 0.29 and 100 is a little below 29.
        return math.floor(Decimal(repr(self.stop_fraction)) * self.total_steps)

    @property
    def num_updates(self) -> int:
        """Updates in the whole training."""
        return max(0, self.stop_step // self.update_every - (max(self.start_step, 1) - 1) // self.update_every)

    def next_update(self, step: int) -> int | None:
        """Returns the optimizer step after which the next update comes, later than ``step``; None if there is none."""
        earliest = max(step + 1, self.start_step, 1)
        candidate = -(-earliest // self.update_every) * self.update_every
        return candidate if candidate <= self.stop_step else None

    def drop_fraction_at(self, step: int) -> float:
        """Returns the fraction of the active weights that an update at ``step`` drops and grows."""
        return self._fraction_at(step, self.drop_fraction, self.final_drop_fraction)

    def unit_drop_fraction_at(self, step: int) -> float:
        """Returns the same of heads and neurons, of which it is an expectation."""
        if self.unit_drop_fraction is None:
            return self.drop_fraction_at(step)
        return self._fraction_at(step, self.unit_drop_fraction, min(self.final_drop_fraction, self.unit_drop_fraction))

    def _fraction_at(self, step: int, initial: float, final: float) -> float:
        schedule = DROP_SCHEDULES[self.drop_schedule]
        return schedule(initial, step - self.start_step, self.stop_step - self.start_step, final)
