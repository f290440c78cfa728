"""The batches of a run, for one rank: training as an endless stream that can start at any step, evaluation exactly once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count, cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from svite_scale.data.batches import BatchDataset, shared_slots
from svite_scale.data.damage import DamageLimit
from svite_scale.data.dataset import Row, ShardDataset
from svite_scale.data.fetch_ahead import FetchAhead
from svite_scale.data.format.index import ShardIndex, load_indexes
from svite_scale.data.loader_process import LoaderContext
from svite_scale.data.options import DataConfig
from svite_scale.data.order import epoch_order, evaluation_rows, rank_rows
from svite_scale.data.remote.cache import RemoteShard, ShardCache, check_window
from svite_scale.data.steps import EpochSteps
from svite_scale.data.transforms import eval_transform, train_transform
from svite_scale.errors import DataError
from svite_scale.runtime.signals import STOP_SIGNALS

PREFETCH = 2
"""Batches that each loader process makes in advance."""

PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``: the signal that the kernel sends to a process when its parent ends."""

MORE_ROOM = "give the job more memory, and more of /dev/shm (docker run --shm-size), or lower data.workers; 0 starts none"


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


def load(
    samples: ShardDataset, rows: Iterable[list[Row]], batch_shape: tuple[int, int, int, int], workers: int, *, substitute: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:
    """The batch of each list of rows, of the shape ``[B, C, H, W]``, through one torch DataLoader.

    Returns:
        Images, labels and marks of damage, as in :class:`Batch`, and what is to be said of the damage.

    Raises:
        DataError: a sample can't be read; or a loader process not be started, or is gone.
    """
    # One that is being taken, and those that are made or wait meanwhile.
    slots = shared_slots(1 + PREFETCH * workers, batch_shape)
    batches = DataLoader(
        BatchDataset(samples, slots, substitute),
        batch_size=None,  # an item is a batch
        sampler=zip(cycle(range(len(slots))), rows),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=LoaderContext() if workers else None,
        worker_init_fn=partial(serve_trainer, os.getpid()),
        # The loader draws a base seed; without a generator of its own that would advance the training process's.
        generator=torch.Generator(),
    )
    try:
        stream = iter(batches)
    except OSError as error:
        raise DataError(f"data.workers = {workers}: loader processes can't be started ({error}); {MORE_ROOM}") from error
    try:
        for slot, labels, damaged, reports in stream:
            yield taken(slots[slot]), torch.tensor(labels), torch.tensor(damaged), reports
    except DataError as error:
        # A worker's error arrives as the text of its traceback, of which the last line is the message.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")) from error
    except RuntimeError as error:
        raise explained(error) from error


def explained(error: BaseException) -> BaseException:
    """What torch raises where a loader process is gone, as a :class:`DataError`; any other error as it is.

    torch raises it in a signal handler, so from wherever the main thread is.
    """
    if not (type(error) is RuntimeError and str(error).startswith("DataLoader worker ")):
        return error
    found, _, _ = str(error).partition(". ")
    cause = "killed for want of memory, unless somebody ended it"
    return DataError(f"data.workers: a loader process is gone ({found}): {cause}; {MORE_ROOM}")


def taken(images: Tensor) -> Tensor:
    """The images in memory of their own, from which a GPU can fetch them."""
    return images.pin_memory() if torch.cuda.is_available() else images.clone()


def serve_trainer(trainer: int, worker: int) -> None:
    """Has a loader process end with the training process, however that ends, or at a SIGTERM of it; and ignore Ctrl-C and the
    warnings of a scheduler.

    Those may go to every process of a job, and the training process needs its workers to finish the step.

    Args:
        trainer: process that forked this one, from a thread that lives as long as it does.
        worker: number of this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(1)  # it ended before it could be bound to
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=end_with_trainer, args=(trainer,), name="signals", daemon=True).start()


def end_with_trainer(trainer: int) -> None:
    """Takes signals, which a handler couldn't tell the sender of, until one comes from that process."""
    while (received := signal.sigwaitinfo(STOP_SIGNALS)).si_pid != trainer or received.si_signo != signal.SIGTERM:
        pass
    os._exit(0)
