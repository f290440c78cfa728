"""Bounds of a number, in a field's annotation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Closed bounds of a number; ``above`` is an open lower bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
