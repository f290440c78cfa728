"""Timing of tasks against each other in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARMUP = 3
"""Number of first rounds that don't count."""


def alternate(tasks: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Returns the seconds of each task in each round. A round runs every task once; every other round runs them backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(WARMUP + rounds):
        for name in list(tasks)[:: -1 if turn % 2 else 1]:
            synchronize(device)
            start = time.perf_counter()
            tasks[name]()
            synchronize(device)
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Returns the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
