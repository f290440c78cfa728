"""The batches of a run, for one rank: training as an endless stream that can start at any step, evaluation exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from svite_scale.config.schema import DataConfig
from svite_scale.data.batches import load
from svite_scale.data.damage import DamageLimit
from svite_scale.data.dataset import Row, ShardDataset
from svite_scale.data.fetch_ahead import FetchAhead
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.order import EpochSteps, epoch_order, evaluation_rows, rank_rows
from svite_scale.data.remote.cache import RemoteShard, ShardCache, check_window
from svite_scale.data.transforms import eval_transform, train_transform
from svite_scale.errors import DataError


class Batch(NamedTuple):
    """What one rank computes at a time."""

    images: Tensor
    """uint8 ``[B, C, H, W]``, in memory pixel by pixel"""
    labels: Tensor
    """int64 ``[B]``"""
    valid: Tensor
    """bool ``[B]``; False marks what no metric may count: padding of an evaluation batch, and its damaged samples."""
    damaged: Tensor
    """bool ``[B]``; True marks samples that couldn't be decoded. At training another one of their shard stands in."""


class TrainData:
    """This rank's share of the training samples, in the order that seed and epoch determine.

    Every rank constructs one. The samples of a step, and their augmentation, are the same for every world size, number of
    accumulation steps and number of workers.

    Attributes:
        steps: how epochs are cut into optimizer steps.
        damage: how many damaged samples are too many.

    Raises:
        DataError: the shards or their indexes can't be used, or hold fewer samples than a global batch.
        ConfigError: the augmentation can't be built.
        ValueError: the global batch isn't divisible by world size times accumulation steps.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        in_channels: int,
        global_batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if global_batch_size % (world_size * accumulation_steps):
            raise ValueError(
                f"{global_batch_size} samples do not divide into {world_size} ranks x {accumulation_steps} micro-batches"
            )
        transform = train_transform(config, image_size)
        indexes = load_indexes(config.train, "data.train", ShardCache.of(config))
        check_window(config, [index.size for index in indexes if isinstance(index.path, RemoteShard)])
        self._samples = ShardDataset(indexes, transform, in_channels, seed, config.max_pixels)
        self._batch_shape = (global_batch_size // (world_size * accumulation_steps), in_channels, image_size, image_size)
        self._config = config
        self._accumulation_steps = accumulation_steps
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self.steps = EpochSteps(len(self._samples), global_batch_size, carry=config.last_batch == "carry")
        self.damage = DamageLimit("data.train", config.max_damaged, "another one of its shard stands in for it")
        if self.num_samples < global_batch_size:
            raise DataError(
                f"data.train = {config.train!r} holds {self.num_samples} samples, fewer than train.global_batch_size "
                f"({global_batch_size}); use more data or a smaller batch"
            )

    @property
    def num_samples(self) -> int:
        """Samples in the training shards."""
        return len(self._samples)

    @property
    def indexes(self) -> list[ShardIndex]:
        """Of the shards, in order."""
        return self._samples.indexes

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return self._samples.num_classes

    def batches(self, first_step: int = 0, last_step: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches, ``accumulation_steps`` of them for each optimizer step.

        The loader's workers live as long as the iterator, over all epochs.

        Args:
            first_step: optimizer step of the run to begin with.
            last_step: stop before this step; None goes on for ever.

        Raises:
            DataError: a sample can't be read, or can't be decoded where ``data.max_damaged`` is 0.
        """
        workers = self._config.workers
        with FetchAhead(self._config, self.indexes, self.steps, last_step, self._seed, self._rank) as fetch_ahead:
            rows = self._rows(first_step, last_step, fetch_ahead)
            for images, labels, damaged, reports in load(self._samples, rows, self._batch_shape, workers, substitute=True):
                self.damage.note(reports)
                yield Batch(images, labels, torch.ones_like(damaged), damaged)

    def _rows(self, first_step: int, last_step: int | None, fetch_ahead: FetchAhead) -> Iterator[list[Row]]:
        """The (epoch, sample, copy) rows of each micro-batch."""
        counts, config, order_epoch = self._samples.counts, self._config, -1
        for step in count(first_step) if last_step is None else range(first_step, last_step):
            rows = []
            for epoch, first, stop in self.steps.pieces(step):
                fetch_ahead.reach(epoch, stop - 1)
                if epoch != order_epoch:
                    order = epoch_order(counts, self._seed, epoch, config.shuffle_shards, config.augment.repeats)
                    order_epoch = epoch
                rows.append(np.insert(order[first:stop], 0, epoch, axis=1))
            mine = rank_rows(np.concatenate(rows), self._rank, self._world_size)
            for micro_batch in np.split(mine, self._accumulation_steps):
                yield [(epoch, sample, copy) for epoch, sample, copy in micro_batch.tolist()]


class EvalData:
    """This rank's share of the evaluation samples; iterating gives its batches, any number of times.

    Every rank constructs one, and each yields the same number of batches of the same size. Over all ranks every sample that
    can be decoded is valid exactly once.

    Attributes:
        damage: how many damaged samples are too many.

    Raises:
        DataError: the shards or their indexes can't be used, or hold no sample.
    """

    def __init__(
        self, config: DataConfig, *, image_size: int, in_channels: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        indexes = load_indexes(config.val, "data.val", ShardCache.of(config))
        transform = eval_transform(config, image_size)
        self._samples = ShardDataset(indexes, transform, in_channels, seed=0, max_pixels=config.max_pixels)
        if not len(self._samples):
            raise DataError(f"data.val = {config.val!r} holds no samples; write shards that do")
        self._batch_shape = (batch_size, in_channels, image_size, image_size)
        self._rows, self._valid = evaluation_rows(len(self._samples), batch_size, rank, world_size)
        self._workers = config.workers
        self.damage = DamageLimit("data.val", config.max_damaged, "it is left out")

    @property
    def num_samples(self) -> int:
        """Samples in the evaluation shards, over all ranks."""
        return len(self._samples)

    @property
    def indexes(self) -> list[ShardIndex]:
        """Of the shards, in order."""
        return self._samples.indexes

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return self._samples.num_classes

    def __len__(self) -> int:
        """Batches of this rank, as of every other."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        rows = ([(0, sample, 0) for sample in batch] for batch in self._rows.tolist())
        batches = load(self._samples, rows, self._batch_shape, self._workers, substitute=False)
        for (images, labels, damaged, reports), counted in zip(batches, torch.from_numpy(self._valid), strict=True):
            self.damage.note(reports)
            yield Batch(images, labels, counted & ~damaged, counted & damaged)
