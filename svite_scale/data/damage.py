"""Samples that can't be decoded: counted, reported once, and an error where there are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from svite_scale.errors import DataError

MIN_SEEN = 10_000
"""The fraction of damaged samples is taken of at least this many, so that a few at the start of a run don't end it."""

logger = logging.getLogger(__name__)
# It has its own level, because other ranks than the main one log errors only, but just one rank reads a given sample.
logger.setLevel(logging.WARNING)


class DamageLimit:
    """Counts damaged samples, and raises an error when there are too many.

    Attributes:
        seen: samples of all ranks that :meth:`add` counted; a resumed run continues to count.
        damaged: how many of them couldn't be decoded.

    Args:
        field: where the samples come from, ``data.train`` or ``data.val``.
        max_fraction: ``data.max_damaged``; 0 allows none.
        consequence: what happens to a damaged sample, for the warning.
    """

    def __init__(self, field: str, max_fraction: float, consequence: str) -> None:
        self._field, self._max_fraction, self._consequence = field, max_fraction, consequence
        self._first: str | None = None
        self.damaged = self.seen = 0

    def report(self, messages: Sequence[str]) -> None:
        """Warns of this rank's first damaged sample, and remembers its message.

        Args:
            messages: one line for each damaged sample of a batch.

        Raises:
            DataError: a sample is damaged, and ``max_fraction`` is 0.
        """
        if not messages or self._first is not None:
            return
        self._first = messages[0]
        if self._max_fraction == 0:
            raise DataError(f"{self._first}; write the shard again, or allow a fraction of such samples by data.max_damaged")
        logger.warning("%s; %s, and further ones are counted in the metrics", self._first, self._consequence)

    def add(self, damaged: int, seen: int) -> None:
        """Adds counts of all ranks to those of the run, and checks the sums.

        Raises:
            DataError: as :meth:`check`.
        """
        self.damaged += damaged
        self.seen += seen
        self.check(self.damaged, self.seen)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, for a checkpoint."""
        return {"damaged": self.damaged, "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the counts to those of :meth:`state_dict`."""
        self.damaged, self.seen = state_dict["damaged"], state_dict["seen"]

    def check(self, damaged: float, seen: float) -> None:
        """Checks counts that are summed over all ranks, so that either all ranks fail or none.

        Raises:
            DataError: a larger fraction than allowed is damaged, or every sample is.
        """
        if damaged and (damaged == seen or damaged > self._max_fraction * max(seen, MIN_SEEN)):
            first = self._first or "other ranks name the first ones"
            raise DataError(
                f"{damaged:,.0f} of {seen:,.0f} samples of {self._field} can't be decoded, "
                f"too many for data.max_damaged = {self._max_fraction}; {first}; write the shards again, or raise it"
            )
