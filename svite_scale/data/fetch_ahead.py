"""Remote shards fetched into the cache before their samples are read."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from svite_scale.data.format.index import ShardIndex
from svite_scale.data.options import DataConfig
from svite_scale.data.order import EpochSteps, Ints, shuffle_groups
from svite_scale.data.remote.cache import RemoteShard
from svite_scale.errors import ConfigError, DataError


class FetchAhead:
    """Fetches the next shuffle group of shards in a thread, while the current group is read.

    Without it, all shards of a group would be fetched when the group's first samples are read. It does nothing for local
    shards, or where ``data.cache_gb`` has no room for two groups. On leaving the context it ends after the shard that it is
    fetching.

    Args:
        options: of the data.
        indexes: all shards to train on, in order.
        steps: which rows of the order are used.
        last_step: the run ends before this step; None if it has no end.
        seed: of the run.
        rank: of this process. The processes of a machine go through a group in different orders, so that each fetches other
            shards.
    """

    def __init__(
        self, options: DataConfig, indexes: list[ShardIndex], steps: EpochSteps, last_step: int | None, seed: int, rank: int
    ) -> None:
        self._shards = [index.path for index in indexes]
        self._counts = np.array([index.count for index in indexes])
        self._repeats, self._shuffle_shards = options.augment.repeats, options.shuffle_shards
        self._rows_per_epoch, self._end = steps.rows_per_epoch, None if last_step is None else steps.pieces(last_step)[0][:2]
        self._seed, self._random = seed, random.Random(rank)
        sizes = remote_sizes(indexes)
        self._enabled = bool(sizes) and bytes_of_groups(options, sizes, groups=2) <= options.cache_gb * 1e9
        self._group_end = (-1, 0)
        self._requested: SimpleQueue[Path | RemoteShard | None] = SimpleQueue()
        self._closed = threading.Event()

    def __enter__(self) -> FetchAhead:
        if self._enabled:
            threading.Thread(target=self._fetch, name="fetch-ahead", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._requested.put(None)

    def advance_to(self, epoch: int, row: int) -> None:
        """Marks ``row`` of an epoch's order as reached. If it begins a new group, requests the shards of the group after it."""
        if self._enabled and (epoch, row) >= self._group_end:
            groups, ends = self._used_groups(epoch)
            current = int(np.searchsorted(ends, row, side="right"))
            self._group_end = (epoch, int(ends[current]))
            # The last group of an epoch may be small, so as many shards as a full group has are fetched, of several groups.
            starts = [*((epoch, int(end)) for end in ends[current:-1]), (epoch + 1, 0)]
            following = zip(starts, [*groups[current + 1 :], self._used_groups(epoch + 1)[0][0]], strict=True)
            coming = [shard for start, group in following if self._end is None or start < self._end for shard in group]
            self._request(coming[: self._shuffle_shards])

    def _used_groups(self, epoch: int) -> tuple[list[Ints], Ints]:
        """Returns the groups that an epoch reads, and the row after each.

        An epoch doesn't read all groups where augmentation is repeated, or where its last samples are left out.
        """
        groups = shuffle_groups(len(self._shards), self._seed, epoch, self._shuffle_shards)
        ends = np.cumsum([self._counts[group].sum() for group in groups]) * self._repeats
        used = int(np.searchsorted(ends, self._rows_per_epoch)) + 1
        return groups[:used], ends[:used]

    def _request(self, numbers: Iterable[int]) -> None:
        shards = [self._shards[number] for number in numbers]
        for shard in self._random.sample(shards, len(shards)):
            self._requested.put(shard)

    def _fetch(self) -> None:
        while (shard := self._requested.get()) is not None and not self._closed.is_set():
            if isinstance(shard, RemoteShard):
                # The loader will try again when it reads the samples, and report the error.
                with suppress(DataError):
                    os.close(shard.open())


def remote_sizes(indexes: Iterable[ShardIndex]) -> list[int]:
    """Returns the bytes of each remote shard."""
    return [index.size for index in indexes if isinstance(index.path, RemoteShard)]


def bytes_of_groups(options: DataConfig, sizes: Sequence[int], groups: int = 1) -> int:
    """Returns the most bytes that so many shuffle groups take, of remote shards of ``sizes`` bytes."""
    return sum(sorted(sizes)[-groups * options.shuffle_shards :])


def check_cache_room(options: DataConfig, sizes: Sequence[int]) -> None:
    """Checks that the cache has room for one shuffle group; otherwise its shards would be fetched again and again.

    Args:
        options: of the data.
        sizes: bytes of the remote shards to train on.

    Raises:
        ConfigError: the largest ``shuffle_shards`` of them don't fit into the cache.
    """
    needed = bytes_of_groups(options, sizes)
    if needed > options.cache_gb * 1e9:
        problem = f"doesn't hold the data.shuffle_shards = {options.shuffle_shards} shards that are read at a time"
        raise ConfigError("data.cache_gb", options.cache_gb, problem, f"use at least {needed / 1e9:.3g}, or lower the other")
