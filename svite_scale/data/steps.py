"""How epochs are cut into optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochSteps:
    """Which rows of which epochs an optimizer step takes; all of it plain arithmetic.

    Without ``carry``, step s takes block ``s % k`` of epoch ``s // k``, where k is ``num_samples // global_batch_size``, and
    the last rows of an epoch that don't fill a global batch are left out. With it, step s takes rows ``s * G`` to
    ``(s + 1) * G`` of all epochs one after another, so what is left of an epoch comes first in the next one's first batch.

    Args:
        num_samples: rows of an epoch, N.
        global_batch_size: rows of a step, G, at most N.
        carry: what happens to the last rows of an epoch.
    """

    num_samples: int
    global_batch_size: int
    carry: bool

    @property
    def per_epoch(self) -> float:
        """Optimizer steps in an epoch; a whole number unless rows are carried over."""
        return self.num_samples / self.global_batch_size if self.carry else self.num_samples // self.global_batch_size

    def total(self, epochs: int) -> int:
        """Optimizer steps of a run."""
        return epochs * self.rows_per_epoch // self.global_batch_size

    def epochs_done(self, step: int) -> int:
        """Epochs whose last row the first ``step`` steps have taken."""
        return step * self.global_batch_size // self.rows_per_epoch

    def ends_epoch(self, step: int, every: int) -> bool:
        """Whether one of every so many epochs ends in the last of the first ``step`` steps, one at least."""
        return self.epochs_done(step) // every > self.epochs_done(step - 1) // every

    def pieces(self, step: int) -> list[tuple[int, int, int]]:
        """The rows that step number ``step`` takes, in order: (epoch, first row, row after the last)."""
        found = []
        start, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        while start < end:
            epoch, first = divmod(start, self.rows_per_epoch)
            stop = min(self.rows_per_epoch, first + end - start)
            found.append((epoch, first, stop))
            start += stop - first
        return found

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch that are used."""
        return self.num_samples if self.carry else self.num_samples // self.global_batch_size * self.global_batch_size
