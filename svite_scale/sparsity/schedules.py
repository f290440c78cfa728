"""How many weights move at an update, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine(initial: float, step: int, total: int, final: float = 0.005) -> float:
    """Drop fraction at ``step``: a half cosine from ``initial`` at step 0 to ``final`` at ``total`` and after.

    Source: the paper's schedule (alpha 0.5 to 0.005), after RigL's cosine with a floor added.
    """
    if total <= 0:
        return final
    progress = min(max(step / total, 0.0), 1.0)
    return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class UpdateSchedule:
    """Topology updates every ``update_every`` optimizer steps, until ``stop_fraction`` of ``total_steps``.

    Args:
        total_steps: optimizer steps of the whole training.
        update_every: optimizer steps between two updates.
        stop_fraction: no update comes after this share of training.
        drop_fraction: share of the active weights that moves at the start.
        final_drop_fraction: the same at the stop.
    """

    total_steps: int
    update_every: int
    stop_fraction: float = 0.8
    drop_fraction: float = 0.5
    final_drop_fraction: float = 0.005

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.update_every < 1:
            raise ValueError(f"total_steps ({self.total_steps}) and update_every ({self.update_every}) must be at least 1")
        if not 0.0 <= self.stop_fraction <= 1.0:
            raise ValueError(f"stop_fraction ({self.stop_fraction}) must be in [0, 1]")
        if not 0.0 <= self.final_drop_fraction <= self.drop_fraction <= 1.0:
            raise ValueError(
                f"need 0 <= final_drop_fraction ({self.final_drop_fraction}) <= drop_fraction ({self.drop_fraction}) <= 1"
            )

    @property
    def stop_step(self) -> int:
        """The last optimizer step after which an update may happen."""
        return int(self.stop_fraction * self.total_steps)

    @property
    def num_updates(self) -> int:
        """Updates in the whole training."""
        return self.stop_step // self.update_every

    def is_update(self, step: int) -> bool:
        """Whether the topology changes after optimizer step ``step`` (the first step is 1)."""
        return 0 < step <= self.stop_step and step % self.update_every == 0

    def rate(self, step: int) -> float:
        """Share of the active weights that an update at ``step`` drops and grows."""
        return cosine(self.drop_fraction, step, self.stop_step, self.final_drop_fraction)
