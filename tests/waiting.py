"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE_S = 120.0


def wait_until(condition: Callable[[], object]) -> None:
    """Returns when the condition holds.

    Raises:
        AssertionError: it never does.
    """
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.02)
