"""Samples that can't be decoded: counted, told once, and fatal where there are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from svite_scale.errors import DataError

MIN_SEEN = 10_000
"""The share of damaged samples is taken of at least this many, so that a few at the start of a run don't end it."""

logger = logging.getLogger(__name__)
# A level of its own: ranks other than the main one keep quiet about what all ranks say, but only one reads this sample.
logger.setLevel(logging.WARNING)


class DamageLimit:
    """How many damaged samples are too many.

    Attributes:
        seen: samples that were counted by :meth:`add`, over all ranks; a resumed run goes on counting.
        damaged: how many of them couldn't be decoded.

    Args:
        field: where the samples come from, ``data.train`` or ``data.val``.
        max_share: ``data.max_damaged``; 0 makes the first one fatal.
        consequence: what becomes of a damaged sample, for the warning.
    """

    def __init__(self, field: str, max_share: float, consequence: str) -> None:
        self._field, self._max_share, self._consequence = field, max_share, consequence
        self._first: str | None = None
        self.damaged = self.seen = 0

    def note(self, reports: Sequence[str]) -> None:
        """Takes note of damaged samples of this rank; warns of the first.

        Raises:
            DataError: there is one, and none is allowed.
        """
        if not reports or self._first is not None:
            return
        self._first = reports[0]
        if self._max_share == 0:
            raise DataError(f"{self._first}; write the shard again, or allow for a share of such samples by data.max_damaged")
        logger.warning("%s; %s, and further ones are counted in the metrics", self._first, self._consequence)

    def add(self, damaged: int, seen: int) -> None:
        """Counts samples of all ranks, and judges those of the run so far.

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
        """Judges counts over all ranks, so that all of them fail together.

        Raises:
            DataError: more than the allowed share of samples is damaged, or all of them are.
        """
        if damaged and (damaged == seen or damaged > self._max_share * max(seen, MIN_SEEN)):
            first = self._first or "other ranks name the first ones"
            raise DataError(
                f"{damaged:,.0f} of {seen:,.0f} samples of {self._field} can't be decoded, "
                f"too many for data.max_damaged = {self._max_share}; {first}; write the shards again, or raise it"
            )
