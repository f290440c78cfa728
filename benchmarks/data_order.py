"""The global order at ImageNet's size: its cost, the quality of its shuffling, and the number of shards that a rank reads."""

from __future__ import annotations

import argparse
import time
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt

from svite_scale.data.order import epoch_order, rank_rows

SAMPLES, SHARDS, BATCH = 1_281_167, 1_281, 4_096
WORLD_SIZES = (1, 8, 64, 512, 4_096)

Ints = npt.NDArray[np.int64]


def shard_counts(samples: int = SAMPLES, shards: int = SHARDS) -> list[int]:
    """Divides samples over shards as evenly as possible."""
    return [samples // shards + (shard < samples % shards) for shard in range(shards)]


def order_section(arguments: argparse.Namespace) -> None:
    """Measures time and peak memory of an epoch's order while the order before it is still in memory, as at an epoch's end."""
    print(f"\n{'order, ' + f'{SAMPLES:,} in {SHARDS:,} shards':44} {'seconds':>8} {'peak MB':>8}")
    counts = shard_counts()
    for world_size in WORLD_SIZES:
        tracemalloc.start()
        held = epoch_order(counts, 0, 0, arguments.shuffle_shards, 3)
        following = order_and_rows(counts, arguments.shuffle_shards, world_size)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        start = time.perf_counter()
        order_and_rows(counts, arguments.shuffle_shards, world_size)
        print(f"{f'world size {world_size:,}, the last rank':44} {time.perf_counter() - start:8.3f} {peak:8.1f}", flush=True)
        del held, following


def order_and_rows(counts: list[int], shuffle_shards: int, world_size: int) -> tuple[Ints, Ints]:
    """Returns the order of epoch 1, and the last rank's rows of its first global batch."""
    order = epoch_order(counts, 0, 1, shuffle_shards, 3)
    return order, rank_rows(order[:BATCH], world_size - 1, world_size)


def shuffling_section(arguments: argparse.Namespace) -> None:
    """Compares the order with a true permutation of all samples."""
    counts = shard_counts()
    permutation = np.random.default_rng(0).permutation(SAMPLES)
    group = arguments.shuffle_shards
    orders = {"true permutation": permutation, f"shuffle groups of {group} shards": epoch_order(counts, 0, 0, group, 1)[:, 0]}
    rows = {name: shuffling(order, counts) for name, order in orders.items()}
    width = max(map(len, next(iter(rows.values()))))
    print(f"\n{'shuffling':{width}} " + " ".join(f"{name:>24}" for name in rows))
    for quantity in next(iter(rows.values())):
        print(f"{quantity:{width}} " + " ".join(f"{row[quantity]:24.5f}" for row in rows.values()))


def shuffling(order: Ints, counts: list[int], batch: int = 1_024) -> dict[str, float]:
    """Returns the mean distances of samples from their old places and between neighbours, as fractions of the epoch.

    A true permutation has 1/3.

    Args:
        order: int ``[N]``, samples of one epoch, each once.
        counts: samples in each shard.
        batch: samples in a global batch.
    """
    shard_of = np.repeat(np.arange(len(counts)), counts)[order]
    batches = shard_of[: len(order) // batch * batch].reshape(-1, batch)
    return {
        "mean displacement": float(np.abs(order - np.arange(len(order))).mean() / len(order)),
        "mean distance of neighbours": float(np.abs(np.diff(order)).mean() / len(order)),
        "mean distance of neighbours' shards": float(np.abs(np.diff(shard_of)).mean() / len(counts)),
        "fraction of neighbours in the same shard": float((np.diff(shard_of) == 0).mean()),
        f"shards in a batch of {batch:,}": float(
            np.mean([len(np.unique(row)) for row in batches[:: max(1, len(batches) // 100)]])
        ),
    }


def locality_section(arguments: argparse.Namespace) -> None:
    """Counts the distinct shards that the last rank reads."""
    counts = shard_counts()
    order = epoch_order(counts, 0, 0, arguments.shuffle_shards, 1)[:, 0]
    names = ("in a step", "in 10 steps", "open at a time", "in an epoch")
    print(f"\n{f'distinct shards, batch {BATCH:,}':32} " + " ".join(f"{name:>15}" for name in names))
    for world_size in WORLD_SIZES:
        found = locality(order, counts, BATCH, world_size - 1, world_size)
        print(f"{f'world size {world_size:,}':32} " + " ".join(f"{value:15,.1f}" for value in found))


def locality(order: Ints, counts: list[int], batch: int, rank: int, world_size: int) -> tuple[float, float, int, int]:
    """Counts the distinct shards that a rank reads: the mean of a step and of 10 steps; the most that are between their first
    and last use at the same time; and those of the epoch.
    """
    shard_of = np.repeat(np.arange(len(counts)), counts)[order]
    steps = shard_of[: len(order) // batch * batch].reshape(-1, batch)[:, rank::world_size]
    return (*(distinct(steps, length) for length in (1, 10)), most_open(steps.ravel()), len(np.unique(steps)))


def distinct(steps: npt.NDArray[Any], length: int) -> float:
    """Returns the mean number of distinct shards in ``length`` successive steps; ``steps`` is int ``[steps, samples]``."""
    starts = range(0, len(steps) - length + 1, max(1, len(steps) // 100))
    return float(np.mean([len(np.unique(steps[start : start + length])) for start in starts]))


def most_open(shards: npt.NDArray[Any]) -> int:
    """Returns the most shards that are between their first and last use at the same time, in a sequence ``[n]`` of shards."""
    first, last = (np.unique(sequence, return_index=True)[1] for sequence in (shards, shards[::-1]))
    change = np.zeros(len(shards) + 1, dtype=np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, len(shards) - last, -1)
    return int(change.cumsum().max())
