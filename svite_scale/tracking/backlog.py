"""Metrics that a full disk or a server that is away doesn't take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")

RETRY_RATIO = 10
"""Shortest pause before the next attempt, as a multiple of how long the failed one took."""

logger = logging.getLogger("svite_scale")


class Backlog(Generic[Item]):
    """Items on their way to a file or a server. Those that it doesn't take wait in memory until it does; the run continues.

    Attributes:
        waiting: the items that aren't sent yet, oldest first.
    """

    def __init__(self, target: str, items: str, send: Callable[[], object], retry_s: float = 0.0) -> None:
        """Begins empty.

        Args:
            target: name of the file or server, for warnings.
            items: what the items are, in the plural, for warnings.
            send: sends what waits, and removes it from :attr:`waiting`.
            retry_s: pause after a failed attempt, because an attempt may hold up training; 0 makes no pause.
        """
        self.waiting: list[Item] = []
        self._target, self._items, self._send, self._retry_s = target, items, send, retry_s
        self._retry_at = 0.0
        self._has_warned = False

    def add(self, items: Iterable[Item]) -> None:
        """Sends items, with those that wait. Warns of the first failure in a row."""
        self.waiting += items
        started = time.monotonic()
        if started < self._retry_at:
            return
        try:
            self._send()
            self._has_warned = False
        except Exception as error:  # a server's library may raise anything
            self.postpone(error, started)

    def postpone(self, error: Exception, started: float) -> None:
        """Waits with the next attempt after one failed that began at ``started``, of ``time.monotonic()``."""
        now = time.monotonic()
        self._retry_at = now + max(self._retry_s, RETRY_RATIO * (now - started)) if self._retry_s else 0.0
        if not self._has_warned:
            problem = f"{self._target} doesn't take {self._items} ({first_line(error)})"
            logger.warning("%s; they wait until it does, and the run continues", problem)
        self._has_warned = True

    def close(self) -> None:
        """Sends what waits; warns if it is lost."""
        if not self.waiting:
            return
        try:
            self._send()
        except Exception as error:
            logger.warning("%s lacks its last %d %s: %s", self._target, len(self.waiting), self._items, first_line(error))


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message that says something."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    return lines[0] if lines else type(error).__name__
