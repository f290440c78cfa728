"""File operations that succeed or fail on all ranks together, so that no rank waits in a collective for one that failed."""

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
        group: the ranks; None for a single process.

    Returns:
        The results of all ranks, by rank, on every rank.

    Raises:
        CheckpointError: the function failed on some rank; gives the reason of the first such rank. On all ranks.
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
    """Runs a function on rank 0 only, and returns its result on all ranks. Errors as in :func:`on_all_ranks`."""
    rank, _ = rank_and_size(group)
    return on_all_ranks(function if rank == 0 else lambda: None, group)[0]  # type: ignore[return-value]
