"""File operations whose outcome all ranks share, so that one rank's error never leaves others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from svite_scale.errors import CheckpointError
from svite_scale.sparsity.sharding import rank_and_size

T = TypeVar("T")


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Runs a function on every rank. A collective.

    Args:
        function: local; may raise ``OSError``.
        group: the ranks; None for a process alone.

    Returns:
        What it returned on each rank, on all ranks.

    Raises:
        CheckpointError: on all ranks, where it failed on one; with the first such rank's reason.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = function()
    except OSError as error:
        problem = str(error)
    _, world_size = rank_and_size(group)
    outcomes: list[tuple[T | None, str | None]] = [(result, problem)] * world_size
    if group is not None:
        dist.all_gather_object(outcomes, (result, problem), group=group)
    for _, reason in outcomes:
        if reason is not None:
            raise CheckpointError(reason)
    return [answer for answer, _ in outcomes]  # type: ignore[misc]


def on_main_rank(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Runs a function on rank 0 alone; what it returned, on all ranks. As :func:`on_all_ranks` otherwise."""
    rank, _ = rank_and_size(group)
    return on_all_ranks(function if rank == 0 else lambda: None, group)[0]  # type: ignore[return-value]
