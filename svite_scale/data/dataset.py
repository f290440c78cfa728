"""Random access to the samples of indexed shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from svite_scale.data.decode import UndecodableError, decode
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.options import DataConfig
from svite_scale.data.randomness import restored_random_state, seed_sample
from svite_scale.data.remote.cache import RemoteShard
from svite_scale.data.transforms import Transform
from svite_scale.errors import DataError


class ShardReader:
    """Reads byte ranges of shards, and keeps the most recently used shards open.

    A shard is opened, and a remote one fetched, when it is first read. ``os.pread`` uses no file position, so a forked worker
    can use the descriptors that it inherits.

    Args:
        paths: the shards, by number; local or remote.
        max_open: most shards that are open at a time; a data set can have more shards than a process may open files.
    """

    def __init__(self, paths: Sequence[Path | RemoteShard], max_open: int = 128) -> None:
        self._paths = list(paths)
        self._max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes of shard number ``shard``, from ``offset``.

        Raises:
            DataError: the file can't be fetched or read, or is too short.
        """
        try:
            data = os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            raise DataError(f"{self._paths[shard]} can't be read at byte {offset} ({error}); restore the file") from error
        if len(data) != length:
            raise DataError(f"{self._paths[shard]} ends before byte {offset + length}, inside a sample; write the shard again")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            self._close_evicted()
            path = self._paths[shard]
            self._descriptors[shard] = path.open() if isinstance(path, RemoteShard) else os.open(path, os.O_RDONLY)
            if len(self._descriptors) > self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _close_evicted(self) -> None:
        """Closes remote shards that are no longer in the cache. While they are open, they take room on the disk."""
        for shard in list(self._descriptors):
            if isinstance(self._paths[shard], RemoteShard) and not os.fstat(self._descriptors[shard]).st_nlink:
                os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        """Closes this process's descriptors; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Descriptor numbers mean nothing in a process that was started by spawn.
        return {**self.__dict__, "_descriptors": OrderedDict()}


Row = tuple[int, int, int]
"""Epoch, global sample index, copy."""


class DamagedSampleError(DataError):
    """The image of a sample can't be decoded. The message names shard, key, byte and reason."""


class ShardDataset:
    """A map from (epoch, sample, copy) to an image and its label.

    Args:
        indexes: of the shards; global sample indexes run through them in this order.
        transform: may draw from the global generators of Python, numpy and torch, which are seeded from the seed and the row.
        in_channels: 3 decodes to RGB, 1 to grey.
        seed: of the run.
        max_pixels: pixels of the largest image that is decoded.
    """

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        transform: Transform,
        in_channels: int,
        seed: int,
        max_pixels: int = DataConfig.max_pixels,
    ) -> None:
        self.indexes = list(indexes)
        self._starts = np.cumsum([0, *self.counts])
        self._reader = ShardReader([index.path for index in indexes])
        self._transform = transform
        self._channels = in_channels
        self._max_pixels = max_pixels
        self._seed = seed

    @property
    def counts(self) -> list[int]:
        """The number of samples in each shard."""
        return [index.count for index in self.indexes]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Row) -> tuple[Tensor, int]:
        """Returns the transformed image, uint8 ``[C, H, W]``, and its label. Leaves the global generators as they were.

        Raises:
            DamagedSampleError: the image can't be decoded.
            DataError: the image can't be read.
        """
        with restored_random_state():
            return self.load_sample(row)

    def load_sample(self, row: Row) -> tuple[Tensor, int]:
        """Returns the same, but leaves the global generators seeded; call it within ``restored_random_state``."""
        epoch, sample, copy = row
        shard, position = self._place(sample)
        index = self.indexes[shard]
        offset = int(index.offsets[position])
        data = self._reader.read(shard, offset, int(index.lengths[position]))
        try:
            pixels = decode(data, self._channels, self._max_pixels)
        except UndecodableError as error:
            raise DamagedSampleError(
                f"{index.path}: the image of sample {index.key(position)!r} at byte {offset} can't be decoded ({error})"
            ) from error
        seed_sample(self._seed, epoch, sample, copy)
        return self._transform(pixels), int(index.labels[position])

    def label(self, sample: int) -> int:
        """Returns the label of a sample."""
        shard, position = self._place(sample)
        return int(self.indexes[shard].labels[position])

    def others_of_shard(self, sample: int) -> Iterator[int]:
        """Yields the other samples of the same shard: those after it, then those before it, each in order."""
        shard, position = self._place(sample)
        start, count = int(self._starts[shard]), self.indexes[shard].count
        return (start + (position + step) % count for step in range(1, count))

    def _place(self, sample: int) -> tuple[int, int]:
        """Returns the shard of a sample, and its position in the shard."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])
