"""The order of samples: pure functions of counts, seed and epoch, the same on every rank and for every world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def epoch_order(counts: Sequence[int], seed: int, epoch: int, shuffle_shards: int, repeats: int) -> Ints:
    """Returns the global order of one epoch.

    Shards are permuted, and samples are shuffled within groups of ``shuffle_shards`` consecutive permuted shards, so that
    only that many shards are read at a time. With ``repeats`` above 1 (repeated augmentation) each sample of this order comes
    that many times in succession, as copies 0, 1, ..., and the order is cut to the length of the data set. So an epoch keeps
    its length and shows a fraction of the samples.

    Args:
        counts: samples in each shard; global sample indexes run through the shards in this order.
        seed: non-negative.
        epoch: from 0.
        shuffle_shards: shards in a shuffle group, at least 1.
        repeats: copies of a sample, at least 1.

    Returns:
        int64 ``[N, 2]`` with rows (global sample index, copy), where N is the sum of ``counts``.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    words = random_words(seed, epoch, len(sizes) + int(sizes.sum()))[len(sizes) :]
    samples = np.empty(len(words), dtype=np.int64)
    filled = 0
    # Group by group, which takes less memory and time than sorting all samples by (group, word).
    for group in shuffle_groups(len(sizes), seed, epoch, shuffle_shards):
        mine = np.concatenate([np.arange(starts[shard], starts[shard] + sizes[shard]) for shard in np.sort(group)])
        samples[filled : filled + len(mine)] = mine[np.argsort(words[mine], kind="stable")]
        filled += len(mine)
    return repeat_copies(samples, repeats)


def shuffle_groups(num_shards: int, seed: int, epoch: int, shuffle_shards: int) -> list[Ints]:
    """Returns the shards of each shuffle group of an epoch; :func:`epoch_order` reads one group after another."""
    shards = np.argsort(random_words(seed, epoch, num_shards), kind="stable")
    return [shards[first : first + shuffle_shards] for first in range(0, num_shards, shuffle_shards)]


def random_words(seed: int, epoch: int, count: int) -> npt.NDArray[np.uint64]:
    """Returns the first random words of an epoch: one for each shard, then one for each sample."""
    # Raw Philox words are sorted instead of calling Generator.permutation. numpy promises that the bit generator's stream never
    # changes, but not those of the methods above it, and a resumed run must find the same order again.
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)


def repeat_copies(samples: Ints, repeats: int) -> Ints:
    """Repeats ``[N]`` samples as ``[N, 2]`` rows (sample, copy): each ``repeats`` times in succession, cut to N rows."""
    count = len(samples)
    rows = np.empty((count, 2), dtype=np.int64)
    rows[:, 0] = np.repeat(samples[: -(-count // repeats)], repeats)[:count]
    rows[:, 1] = np.arange(count) % repeats
    return rows


def rank_rows(global_batch_rows: Ints, rank: int, world_size: int) -> Ints:
    """Returns the rows of one global batch ``[G, ...]`` that ``rank`` computes, ``[G / world_size, ...]``.

    Rows are dealt out like cards. The copies of a sample follow each other, so they go to different ranks.

    Raises:
        ValueError: G is not divisible by the world size.
    """
    if len(global_batch_rows) % world_size:
        raise ValueError(f"a global batch of {len(global_batch_rows)} rows is not divisible by world size {world_size}")
    return global_batch_rows[rank::world_size]


def evaluation_rows(count: int, batch_size: int, rank: int, world_size: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Returns the samples that ``rank`` evaluates. Over all ranks each of ``count`` samples is valid exactly once.

    Returns:
        Samples, int64 ``[batches, batch_size]``, and whether each is valid, bool of that shape. The shapes are the same on all
        ranks. Padding repeats the last sample and isn't valid.
    """
    num_batches = -(-count // (batch_size * world_size))
    positions = np.arange(num_batches * batch_size * world_size).reshape(num_batches, batch_size, world_size)[:, :, rank]
    return np.minimum(positions, count - 1), positions < count


@dataclass(frozen=True)
class EpochSteps:
    """The rows of epochs that each optimizer step takes, by plain arithmetic.

    Without ``carry``, step s takes block ``s % k`` of epoch ``s // k``, where k is ``num_samples // global_batch_size``. The
    last rows of an epoch that don't fill a global batch are left out. With ``carry``, epochs are one long sequence of rows, and
    step s takes rows ``s * G`` to ``(s + 1) * G``. So the last rows of an epoch come first in the next epoch's first batch.

    Args:
        num_samples: rows of an epoch, N.
        global_batch_size: rows of a step, G, at most N.
        carry: whether the last rows of an epoch come first in the next one, instead of being left out.
    """

    num_samples: int
    global_batch_size: int
    carry: bool

    @property
    def per_epoch(self) -> float:
        """The number of optimizer steps in an epoch; a whole number unless ``carry``."""
        return self.num_samples / self.global_batch_size if self.carry else self.num_samples // self.global_batch_size

    def total(self, epochs: int) -> int:
        """Returns the number of optimizer steps of a run."""
        return epochs * self.rows_per_epoch // self.global_batch_size

    def epochs_done(self, step: int) -> int:
        """Returns the number of epochs that the first ``step`` steps complete."""
        return step * self.global_batch_size // self.rows_per_epoch

    def ends_epoch(self, step: int, every: int) -> bool:
        """Tests whether the last of the first ``step`` steps (at least 1) completes a multiple of ``every`` epochs."""
        return self.epochs_done(step) // every > self.epochs_done(step - 1) // every

    def pieces(self, step: int) -> list[tuple[int, int, int]]:
        """Returns the rows that step number ``step`` takes, in order: (epoch, first row, row after the last)."""
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
        """The number of rows of an epoch that are used."""
        return self.num_samples if self.carry else self.num_samples // self.global_batch_size * self.global_batch_size
