"""How many weights move at an update, and when."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral


def cosine(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Drop fraction at ``step``: a half cosine from ``initial`` at step 0 to ``final`` at ``total`` and after.

    Source: the paper's schedule (alpha 0.5 to 0.005), after RigL's cosine with a floor added.
    """
    return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, total)))


def linear(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Drop fraction at ``step``: a line from ``initial`` at step 0 to ``final`` at ``total`` and after."""
    return initial + (final - initial) * _progress(step, total)


def constant(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Drop fraction at any step: ``initial``."""
    return initial


DROP_SCHEDULES: dict[str, Callable[[float, int, int, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}


def _progress(step: int, total: int) -> float:
    return min(max(step / total, 0.0), 1.0) if total > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class UpdateSchedule:
    """Topology updates at every multiple of ``update_every`` optimizer steps, from ``start_step`` to ``stop_fraction`` of
    ``total_steps``.

    Args:
        total_steps: optimizer steps of the whole training.
        update_every: optimizer steps between two updates.
        start_step: no update comes before this step, from which the drop fraction falls.
        stop_fraction: no update comes after this share of training.
        drop_fraction: share of the active weights that moves at the start.
        final_drop_fraction: the same at the stop; ``constant`` doesn't use it.
        drop_schedule: how the one becomes the other; see :data:`DROP_SCHEDULES`.
    """

    total_steps: int
    update_every: int
    start_step: int = 0
    stop_fraction: float = 0.8
    drop_fraction: float = 0.5
    final_drop_fraction: float = 0.005
    drop_schedule: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("total_steps", "update_every", "start_step"):
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise ValueError(f"{name} ({value!r}) must be a whole number of optimizer steps, an int")
        if self.total_steps < 1 or self.update_every < 1:
            raise ValueError(f"total_steps ({self.total_steps}) and update_every ({self.update_every}) must be at least 1")
        if self.start_step < 0:
            raise ValueError(f"start_step ({self.start_step}) must be at least 0")
        if not 0.0 <= self.stop_fraction <= 1.0:
            raise ValueError(f"stop_fraction ({self.stop_fraction}) must be in [0, 1]")
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ValueError(f"drop_fraction ({self.drop_fraction}) must be in [0, 1]")
        if self.drop_schedule != "constant" and not 0.0 <= self.final_drop_fraction <= self.drop_fraction:
            raise ValueError(
                f"need 0 <= final_drop_fraction ({self.final_drop_fraction}) <= drop_fraction ({self.drop_fraction})"
            )
        if self.drop_schedule not in DROP_SCHEDULES:
            raise ValueError(f"drop_schedule {self.drop_schedule!r} is unknown; use one of {', '.join(DROP_SCHEDULES)}")

    @property
    def stop_step(self) -> int:
        """The last optimizer step after which an update may happen."""
        # As the decimal that was written: in binary the product of 0.29 and 100 is a little below 29.
        return math.floor(Decimal(repr(float(self.stop_fraction))) * int(self.total_steps))

    @property
    def num_updates(self) -> int:
        """Updates in the whole training."""
        return max(0, self.stop_step // self.update_every - (max(self.start_step, 1) - 1) // self.update_every)

    def next_update(self, step: int) -> int | None:
        """The optimizer step after which the next update comes, later than ``step``; None if there is none any more."""
        earliest = max(step + 1, self.start_step, 1)
        candidate = -(-earliest // self.update_every) * self.update_every
        return candidate if candidate <= self.stop_step else None

    def is_update(self, step: int) -> bool:
        """Whether the topology changes after optimizer step ``step`` (the first step is 1)."""
        return self.next_update(step - 1) == step

    def rate(self, step: int) -> float:
        """Share of the active weights that an update at ``step`` drops and grows."""
        schedule = DROP_SCHEDULES[self.drop_schedule]
        return schedule(self.drop_fraction, step - self.start_step, self.stop_step - self.start_step, self.final_drop_fraction)
