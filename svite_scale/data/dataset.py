"""Random access to the samples of indexed shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from svite_scale.data.index import ShardIndex
from svite_scale.data.randomness import seeded
from svite_scale.data.reader import ShardReader
from svite_scale.errors import DataError

Row = tuple[int, int, int]
"""Epoch, global sample index, copy."""


class ShardDataset(Dataset[tuple[Tensor, int]]):
    """A map-style dataset over (epoch, sample, copy).

    Args:
        indexes: the shards; global sample indexes run through them in this order.
        transform: PIL image to uint8 ``[C, H, W]``. What it draws from Python's, numpy's and torch's global generators
            depends on the seed and the row alone.
        in_channels: 3 decodes to RGB, 1 to grey.
        seed: of the run.
    """

    def __init__(
        self, indexes: Sequence[ShardIndex], transform: Callable[[Image.Image], Tensor], in_channels: int, seed: int
    ) -> None:
        self._indexes = list(indexes)
        self._starts = np.cumsum([0, *self.counts])
        self._reader = ShardReader([index.path for index in indexes])
        self._transform = transform
        self._mode = {1: "L", 3: "RGB"}[in_channels]
        self._seed = seed

    @property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return [index.count for index in self._indexes]

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return 1 + max((int(index.labels.max()) for index in self._indexes if index.count), default=-1)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Row) -> tuple[Tensor, int]:
        """The transformed image, uint8 ``[C, H, W]``, and its label.

        Raises:
            DataError: the image can't be read or decoded.
        """
        epoch, sample, copy = row
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        position = sample - int(self._starts[shard])
        image = self._decode(shard, position)
        with seeded(self._seed, epoch, sample, copy):
            return self._transform(image), int(self._indexes[shard].labels[position])

    def _decode(self, shard: int, position: int) -> Image.Image:
        index = self._indexes[shard]
        offset = int(index.offsets[position])
        data = self._reader.read(shard, offset, int(index.lengths[position]))
        try:
            return Image.open(BytesIO(data)).convert(self._mode)
        except Exception as error:  # the decoders of damaged files raise many kinds
            raise DataError(
                f"{index.path}: the image of sample {index.key(position)!r} at byte {offset} can't be decoded ({error}); "
                "replace it in the source and write the shard again"
            ) from error
