"""The batches of a run, for one rank: training as an endless stream that can start at any step, evaluation exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from svite_scale.data.batches import load_batches
from svite_scale.data.damage import DamageLimit
from svite_scale.data.dataset import Row, ShardDataset
from svite_scale.data.fetch_ahead import FetchAhead, check_cache_room, remote_sizes
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.options import DataConfig
from svite_scale.data.order import EpochSteps, epoch_order, evaluation_rows, rank_rows
from svite_scale.data.transforms import eval_transform, train_transform
from svite_scale.errors import DataError
from svite_scale.runtime.world import World

ONE_PROCESS = World()


class Batch(NamedTuple):
    """Samples that one rank computes at a time."""

    images: Tensor
    """uint8 ``[B, C, H, W]``, in memory pixel by pixel"""
    labels: Tensor
    """int64 ``[B]``"""
    valid: Tensor
    """bool ``[B]``; False where no metric may count the sample: padding of an evaluation batch, and its damaged samples."""
    damaged: Tensor
    """bool ``[B]``; True where the sample couldn't be decoded. At training, another sample of its shard replaces it."""


class TrainData:
    """The training samples of one rank, in the order that seed and epoch determine.

    Every rank constructs one; it is no collective. The samples of a step, and their augmentation, are the same for every world
    size, number of accumulation steps and number of workers.

    Attributes:
        num_samples: samples in the training shards, over all ranks.
        indexes: of the shards, in order.
        steps: how epochs are cut into optimizer steps.
        damage: counts damaged samples, and limits them.

    Args:
        options: of the data.
        image_shape: ``(C, H, W)`` of the images; H and W are equal.
        global_batch_size: samples of an optimizer step, over all ranks.
        seed: of the run.
        accumulation_steps: micro-batches into which each rank divides its part of them.
        world: this rank and the number of ranks; the default is one process.

    Raises:
        DataError: the shards or their indexes can't be used, or hold fewer samples than a global batch.
        ConfigError: the augmentation can't be built, or the cache of remote shards is too small.
        ValueError: the global batch isn't divisible by world size times accumulation steps.
    """

    def __init__(
        self,
        options: DataConfig,
        *,
        image_shape: tuple[int, int, int],
        global_batch_size: int,
        seed: int,
        accumulation_steps: int = 1,
        world: World = ONE_PROCESS,
    ) -> None:
        micro_batch_size, rest = divmod(global_batch_size, world.size * accumulation_steps)
        if rest:
            raise ValueError(
                f"{global_batch_size} samples do not divide into {world.size} ranks x {accumulation_steps} micro-batches"
            )
        self._options, self._world, self._seed = options, world, seed
        self._batch_shape, self._accumulation_steps = (micro_batch_size, *image_shape), accumulation_steps
        channels, _, image_size = image_shape
        transform = train_transform(options, image_size)
        self.indexes: list[ShardIndex] = load_indexes(options.train, "data.train", options)
        check_cache_room(options, remote_sizes(self.indexes))
        self._samples = ShardDataset(self.indexes, transform, channels, seed, options.max_pixels)
        self.num_samples = len(self._samples)
        self.steps = EpochSteps(self.num_samples, global_batch_size, carry=options.last_batch == "carry")
        self.damage = DamageLimit("data.train", options.max_damaged, "another one of its shard replaces it")
        if self.num_samples < global_batch_size:
            raise DataError(
                f"data.train = {options.train!r} holds {self.num_samples} samples, fewer than train.global_batch_size "
                f"({global_batch_size}); use more data or a smaller batch"
            )

    def batches(self, first_step: int = 0, last_step: int | None = None) -> Iterator[Batch]:
        """Yields this rank's micro-batches, ``accumulation_steps`` of them for each optimizer step.

        The loader's workers live as long as the iterator, over all epochs.

        Args:
            first_step: optimizer step of the run to begin with.
            last_step: the iterator ends before this step; None if it has no end.

        Raises:
            DataError: a sample can't be read; or one can't be decoded, and ``data.max_damaged`` is 0.
        """
        workers = self._options.workers
        with FetchAhead(self._options, self.indexes, self.steps, last_step, self._seed, self._world.rank) as fetch_ahead:
            rows = self._rows(first_step, last_step, fetch_ahead)
            with closing(load_batches(self._samples, rows, self._batch_shape, workers, replace=True)) as batches:
                for images, labels, damaged, messages in batches:
                    self.damage.report(messages)
                    yield Batch(images, labels, torch.ones_like(damaged), damaged)

    def _rows(self, first_step: int, last_step: int | None, fetch_ahead: FetchAhead) -> Iterator[list[Row]]:
        """Yields the (epoch, sample, copy) rows of each micro-batch."""
        options, order_epoch = self._options, -1
        for step in count(first_step) if last_step is None else range(first_step, last_step):
            rows = []
            for epoch, first, stop in self.steps.pieces(step):
                fetch_ahead.advance_to(epoch, stop - 1)
                if epoch != order_epoch:
                    counts, repeats = self._samples.counts, options.augment.repeats
                    order = epoch_order(counts, self._seed, epoch, options.shuffle_shards, repeats)
                    order_epoch = epoch
                rows.append(np.insert(order[first:stop], 0, epoch, axis=1))
            mine = rank_rows(np.concatenate(rows), self._world.rank, self._world.size)
            for micro_batch in np.split(mine, self._accumulation_steps):
                yield [(epoch, sample, copy) for epoch, sample, copy in micro_batch.tolist()]


class EvalData:
    """The evaluation samples of one rank; iterating yields its batches, any number of times.

    Every rank constructs one; it is no collective. Each rank yields the same number of batches of the same size. Over all
    ranks, every sample that can be decoded is valid exactly once.

    Attributes:
        num_samples: samples in the evaluation shards, over all ranks.
        samples: int64 ``[batches, B]``, number of each sample of this rank's batches among them.
        indexes: of the shards, in order.
        damage: counts damaged samples, and limits them.

    Args:
        options: of the data.
        image_shape: ``(C, H, W)`` of the images; H and W are equal.
        batch_size: samples in each batch of a rank.
        world: this rank and the number of ranks; the default is one process.

    Raises:
        DataError: the shards or their indexes can't be used, or hold no sample.
    """

    def __init__(
        self, options: DataConfig, *, image_shape: tuple[int, int, int], batch_size: int, world: World = ONE_PROCESS
    ) -> None:
        channels, _, image_size = image_shape
        transform = eval_transform(options, image_size)
        self.indexes: list[ShardIndex] = load_indexes(options.val, "data.val", options)
        self._dataset = ShardDataset(self.indexes, transform, channels, seed=0, max_pixels=options.max_pixels)
        self.num_samples = len(self._dataset)
        if not self.num_samples:
            raise DataError(f"data.val = {options.val!r} holds no samples; write shards that do")
        self._batch_shape, self._workers = (batch_size, *image_shape), options.workers
        self.samples, self._valid = evaluation_rows(self.num_samples, batch_size, world.rank, world.size)
        self.damage = DamageLimit("data.val", options.max_damaged, "it is left out")

    def __iter__(self) -> Iterator[Batch]:
        rows = ([(0, sample, 0) for sample in batch] for batch in self.samples.tolist())
        with closing(load_batches(self._dataset, rows, self._batch_shape, self._workers, replace=False)) as batches:
            for (images, labels, damaged, messages), counted in zip(batches, torch.from_numpy(self._valid), strict=True):
                self.damage.report(messages)
                yield Batch(images, labels, counted & ~damaged, counted & damaged)
