"""The batches of a run, for one rank: training as an endless stream that can start at any step, evaluation exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from svite_scale.config import DataConfig
from svite_scale.data.cache import RemoteShard, ShardCache, check_window
from svite_scale.data.dataset import Row, ShardDataset
from svite_scale.data.index import load_indexes
from svite_scale.data.order import epoch_order, evaluation_rows, rank_rows
from svite_scale.data.transforms import eval_transform, train_transform
from svite_scale.errors import DataError


class Batch(NamedTuple):
    """What one rank computes at a time."""

    images: Tensor
    """uint8 ``[B, C, H, W]``"""
    labels: Tensor
    """int64 ``[B]``"""
    valid: Tensor
    """bool ``[B]``; False marks padding of an evaluation batch, which no metric may count."""


class TrainData:
    """This rank's share of the training samples, in the order that seed and epoch determine.

    Every rank constructs one. Step s is row block ``s % steps_per_epoch`` of epoch ``s // steps_per_epoch``; the samples of a
    step and their augmentation are the same for every world size, number of accumulation steps and number of workers.
    The last rows of an epoch that don't fill a global batch are left out.

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
        self._dataset = ShardDataset(indexes, transform, in_channels, seed)
        self._config = config
        self._global_batch_size, self._accumulation_steps = global_batch_size, accumulation_steps
        self._rank, self._world_size, self._seed = rank, world_size, seed
        if not self.steps_per_epoch:
            raise DataError(
                f"data.train = {config.train!r} holds {self.num_samples} samples, fewer than train.global_batch_size "
                f"({global_batch_size}); use more data or a smaller batch"
            )

    @property
    def num_samples(self) -> int:
        """Samples in the training shards."""
        return len(self._dataset)

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return self._dataset.num_classes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.num_samples // self._global_batch_size

    def batches(self, first_step: int = 0, last_step: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches, ``accumulation_steps`` of them for each optimizer step.

        The loader's workers live as long as the iterator, over all epochs.

        Args:
            first_step: optimizer step of the run to begin with.
            last_step: stop before this step; None goes on for ever.

        Raises:
            DataError: a sample can't be read.
        """
        for images, labels in loader(self._dataset, self._rows(first_step, last_step), self._config.workers):
            yield Batch(images, labels, torch.ones(len(labels), dtype=torch.bool))

    def _rows(self, first_step: int, last_step: int | None) -> Iterator[list[Row]]:
        """The (epoch, sample, copy) rows of each micro-batch."""
        order_epoch = -1
        for step in count(first_step) if last_step is None else range(first_step, last_step):
            epoch, block = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                config = self._config
                order = epoch_order(self._dataset.counts, self._seed, epoch, config.shuffle_shards, config.augment.repeats)
                order_epoch = epoch
            start = block * self._global_batch_size
            mine = rank_rows(order[start : start + self._global_batch_size], self._rank, self._world_size)
            for micro_batch in np.split(mine, self._accumulation_steps):
                yield [(epoch, sample, copy) for sample, copy in micro_batch.tolist()]


class EvalData:
    """This rank's share of the evaluation samples; iterating gives its batches, any number of times.

    Every rank constructs one, and each yields the same number of batches of the same size. Over all ranks every sample is
    valid exactly once.

    Raises:
        DataError: the shards or their indexes can't be used, or hold no sample.
    """

    def __init__(
        self, config: DataConfig, *, image_size: int, in_channels: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        indexes = load_indexes(config.val, "data.val", ShardCache.of(config))
        self._dataset = ShardDataset(indexes, eval_transform(config, image_size), in_channels, seed=0)
        if not len(self._dataset):
            raise DataError(f"data.val = {config.val!r} holds no samples; write shards that do")
        self._samples, self._valid = evaluation_rows(len(self._dataset), batch_size, rank, world_size)
        self._workers = config.workers

    @property
    def num_samples(self) -> int:
        """Samples in the evaluation shards, over all ranks."""
        return len(self._dataset)

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return self._dataset.num_classes

    def __len__(self) -> int:
        """Batches of this rank, as of every other."""
        return len(self._samples)

    def __iter__(self) -> Iterator[Batch]:
        rows = ([(0, sample, 0) for sample in batch] for batch in self._samples.tolist())
        batches = loader(self._dataset, rows, self._workers)
        for (images, labels), valid in zip(batches, self._valid, strict=True):
            yield Batch(images, labels, torch.from_numpy(valid))


def loader(dataset: ShardDataset, rows: Iterable[list[Row]], workers: int) -> Iterator[list[Tensor]]:
    """Images and labels of each batch of rows, through one torch DataLoader."""
    batches = DataLoader(
        dataset,
        batch_sampler=rows,
        num_workers=workers,
        collate_fn=default_collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
        # The loader draws a base seed; without a generator of its own that would advance the training process's.
        generator=torch.Generator(),
    )
    try:
        yield from batches
    except DataError as error:
        # A worker's error arrives as the text of its traceback, of which the last line is the message.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")) from error
