"""Random access to the samples of indexed shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from svite_scale.data.decode import UndecodableError, decode
from svite_scale.data.format.index import ShardIndex, largest_label
from svite_scale.data.options import DataConfig
from svite_scale.data.randomness import restored, seed_sample
from svite_scale.data.reader import ShardReader
from svite_scale.data.transforms import Transform
from svite_scale.errors import DataError

Row = tuple[int, int, int]
"""Epoch, global sample index, copy."""


class DamagedSampleError(DataError):
    """The image of one sample can't be decoded; the message names shard, key, byte and reason."""


class ShardDataset:
    """A map over (epoch, sample, copy).

    Args:
        indexes: the shards; global sample indexes run through them in this order.
        transform: what it draws from Python's, numpy's and torch's global generators depends on the seed and the row alone.
        in_channels: 3 decodes to RGB, 1 to grey.
        seed: of the run.
        max_pixels: of the largest image that is decoded.
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
        """Samples in each shard."""
        return [index.count for index in self.indexes]

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return largest_label(self.indexes)[0] + 1

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Row) -> tuple[Tensor, int]:
        """The transformed image, uint8 ``[C, H, W]``, and its label. Leaves the global generators as they were.

        Raises:
            DamagedSampleError: the image can't be decoded.
            DataError: it can't be read.
        """
        with restored():
            return self.load(row)

    def load(self, row: Row) -> tuple[Tensor, int]:
        """The same, but leaves the global generators seeded; for use within :func:`~svite_scale.data.randomness.restored`."""
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
        """The label of a sample."""
        shard, position = self._place(sample)
        return int(self.indexes[shard].labels[position])

    def others_of_shard(self, sample: int) -> Iterator[int]:
        """The other samples of the same shard, from the next one on, and at its end from its beginning."""
        shard, position = self._place(sample)
        start, count = int(self._starts[shard]), self.indexes[shard].count
        return (start + (position + step) % count for step in range(1, count))

    def _place(self, sample: int) -> tuple[int, int]:
        """A sample's shard, and its position there."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])
