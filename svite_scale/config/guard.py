"""What ends a run, or mends it, when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from svite_scale.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Ranks that die or hang, gradients that aren't finite, and losses that spike."""

    hang_timeout_s: Annotated[float | None, Bounds(low=1.0, high=86_400.0)] = 600.0
    """Seconds from a rank's last sign of life, or the last progress of the slowest rank, to the end of all processes. Must be
    longer than any one phase: a topology update, a save, a batch of evaluation. Null waits for ever."""
    max_nonfinite_steps: Annotated[int | None, Bounds(low=1)] = 10
    """Steps whose loss or gradient isn't finite are skipped; so many in a row stop the run. Costs a wait for the gradient's
    norm in each step, and with FSDP2, unless gradients are clipped, a scalar all-reduce. Null doesn't look, but DeepSpeed does,
    and skips them by itself."""
    spike_factor: Annotated[float | None, Bounds(above=1.0)] = None
    """A loss in the metrics above this times the mean of the 16 before it takes the run back to its last checkpoint, and the
    batches since then are left out. Null never does."""
    max_rollbacks: Annotated[int, Bounds(low=1)] = 3
    """The next spike after so many stops the run."""
