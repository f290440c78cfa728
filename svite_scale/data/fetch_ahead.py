"""Remote shards fetched before their samples' turn comes."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from svite_scale.config.schema import DataConfig
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.order import EpochSteps, Ints, epoch_windows
from svite_scale.data.remote.cache import RemoteShard, window_size
from svite_scale.errors import DataError


class FetchAhead:
    """Fetches, while one window of shards is being read, the next one's into the cache, in a thread.

    Without it all shards of a window would be fetched when its first samples are due. It does nothing for local shards, nor
    where ``data.cache_gb`` hasn't room for two windows. On leaving the context it ends after the shard that it is fetching.

    Args:
        config: of the data.
        indexes: all shards to train on, in order.
        steps: which rows of the order are used.
        last_step: that the run ends before; None where it has no end.
        seed: of the run.
        rank: this process's. The processes of a machine go through a window in different orders, so that they fetch different
            shards.
    """

    def __init__(
        self, config: DataConfig, indexes: list[ShardIndex], steps: EpochSteps, last_step: int | None, seed: int, rank: int
    ) -> None:
        self._shards = [index.path for index in indexes]
        self._counts = np.array([index.count for index in indexes])
        self._repeats, self._shuffle_shards = config.augment.repeats, config.shuffle_shards
        self._rows_per_epoch, self._end = steps.rows_per_epoch, None if last_step is None else steps.pieces(last_step)[0][:2]
        self._seed, self._random = seed, random.Random(rank)
        sizes = [index.size for index in indexes if isinstance(index.path, RemoteShard)]
        self._enabled = bool(sizes) and window_size(config, sizes, windows=2) <= config.cache_gb * 1e9
        self._window_end = (-1, 0)
        self._wanted: SimpleQueue[Path | RemoteShard | None] = SimpleQueue()
        self._closed = threading.Event()

    def __enter__(self) -> FetchAhead:
        if self._enabled:
            threading.Thread(target=self._fetch, name="fetch-ahead", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._wanted.put(None)

    def reach(self, epoch: int, row: int) -> None:
        """Tells that row ``row`` of an epoch's order is the last that is read now; has what follows its window fetched."""
        if self._enabled and (epoch, row) >= self._window_end:
            windows, ends = self._used_windows(epoch)
            current = int(np.searchsorted(ends, row, side="right"))
            self._window_end = (epoch, int(ends[current]))
            # An epoch's last window may be a small one, so as many shards as a window has are fetched, whatever windows hold.
            starts = [*((epoch, int(end)) for end in ends[current:-1]), (epoch + 1, 0)]
            following = zip(starts, [*windows[current + 1 :], self._used_windows(epoch + 1)[0][0]], strict=True)
            coming = [shard for start, window in following if self._end is None or start < self._end for shard in window]
            self._want(coming[: self._shuffle_shards])

    def _used_windows(self, epoch: int) -> tuple[list[Ints], Ints]:
        """The windows that an epoch reads, and the row after each. Repeated augmentation shows a share of the samples, and the
        last ones may be left out, so there may be others."""
        windows = epoch_windows(len(self._shards), self._seed, epoch, self._shuffle_shards)
        ends = np.cumsum([self._counts[window].sum() for window in windows]) * self._repeats
        used = int(np.searchsorted(ends, self._rows_per_epoch)) + 1
        return windows[:used], ends[:used]

    def _want(self, numbers: Iterable[int]) -> None:
        shards = [self._shards[number] for number in numbers]
        for shard in self._random.sample(shards, len(shards)):
            self._wanted.put(shard)

    def _fetch(self) -> None:
        while (shard := self._wanted.get()) is not None and not self._closed.is_set():
            if isinstance(shard, RemoteShard):
                # Who reads its samples tries again, and tells what is wrong.
                with suppress(DataError):
                    os.close(shard.open())
