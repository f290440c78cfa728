"""Batches of samples, made in loader processes; damaged samples are replaced or marked."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Generator, Iterable
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svite_scale.data.dataset import DamagedSampleError, Row, ShardDataset
from svite_scale.data.randomness import restored_random_state
from svite_scale.data.workers import LoaderContext, serve_trainer
from svite_scale.errors import DataError

PREFETCH = 2
"""Batches that each loader process makes in advance."""

MORE_ROOM = "give the job more memory, and more of /dev/shm (docker run --shm-size), or lower data.workers; 0 starts none"


def load_batches(
    samples: ShardDataset, rows: Iterable[list[Row]], batch_shape: tuple[int, int, int, int], workers: int, *, replace: bool
) -> Generator[tuple[Tensor, Tensor, Tensor, list[str]], None, None]:
    """Yields the batch of each list of rows, through one torch DataLoader.

    Args:
        samples: to read.
        rows: (epoch, sample, copy) of each sample of each batch.
        batch_shape: ``[B, C, H, W]``.
        workers: loader processes; 0 loads in this process.
        replace: as for :class:`BatchDataset`.

    Yields:
        Images uint8 ``[B, C, H, W]``, labels int64 ``[B]``, damaged bool ``[B]``, and a message for each damaged sample.

    Raises:
        DataError: a sample can't be read; or a loader process can't be started, or has ended.
    """
    # One slot for the batch that is being copied, and the others for batches that are made or wait meanwhile.
    slots = shared_slots(1 + PREFETCH * workers, batch_shape)
    batches = DataLoader(
        BatchDataset(samples, slots, replace),
        batch_size=None,  # an item is a batch
        sampler=zip(cycle(range(len(slots))), rows),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=LoaderContext() if workers else None,
        worker_init_fn=partial(serve_trainer, os.getpid()),
        # The loader draws a base seed. Without its own generator it would advance the one of the training process.
        generator=torch.Generator(),
    )
    try:
        stream = iter(batches)
    except OSError as error:
        raise DataError(f"data.workers = {workers}: loader processes can't be started ({error}); {MORE_ROOM}") from error
    try:
        for slot, labels, damaged, messages in stream:
            yield copy_for_device(slots[slot]), torch.tensor(labels), torch.tensor(damaged), messages
        return
    except DataError as error:
        # The error of a worker arrives as the text of its traceback, whose last line is the message.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        error.__traceback__ = None  # torch's frames hold the error, and it holds them
    except RuntimeError as error:
        explained = explain_loader_error(error)
        if explained is error:
            raise
        message = str(explained)
    # Raised without torch's own error, whose traceback would keep the loader's pipes until Python's cyclic collector finds
    # them. It may close a pipe that a queue's thread closes too, and so a file that was opened meanwhile.
    del stream
    raise DataError(message)


def explain_loader_error(error: BaseException) -> BaseException:
    """Returns a :class:`DataError` for the error that torch raises when a loader process has ended; any other error as it is.

    torch raises it in a signal handler, so anywhere in the main thread.
    """
    if not (type(error) is RuntimeError and str(error).startswith("DataLoader worker ")):
        return error
    found, _, _ = str(error).partition(". ")
    cause = "probably killed because memory ran out"
    return DataError(f"data.workers: a loader process is gone ({found}): {cause}; {MORE_ROOM}")


def copy_for_device(images: Tensor) -> Tensor:
    """Returns a copy, in pinned memory where there is a GPU."""
    return images.pin_memory() if torch.cuda.is_available() else images.clone()


def shared_slots(count: int, batch_shape: tuple[int, int, int, int]) -> Tensor:
    """Allocates memory for the images of ``count`` batches ``[B, C, H, W]``, shared with processes forked from this one.

    The memory is anonymous: no batch needs a name, a transfer or an open file, and the size of /dev/shm, small in containers,
    is no limit.

    Returns:
        uint8 ``[count, B, C, H, W]``, in memory pixel by pixel, as images come from Pillow.

    Raises:
        DataError: there isn't enough memory.
    """
    batch_size, channels, height, width = batch_shape
    shape = (count, batch_size, height, width, channels)
    size = math.prod(shape)
    try:
        memory = mmap.mmap(-1, size)
    except OSError as error:
        raise DataError(
            f"{count} batches of {batch_size} images need {size} bytes of memory, which aren't available ({error}); lower "
            "data.workers, or raise train.accumulation_steps, or for evaluation lower train.eval_batch_size"
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape).permute(0, 1, 4, 2, 3)


class LoadedBatch(NamedTuple):
    """A loader process's message about a batch, whose images it has put into a slot."""

    slot: int
    labels: list[int]
    damaged: list[bool]
    """True where the image couldn't be decoded."""
    messages: list[str]
    """One line for each damaged sample."""


class BatchDataset(Dataset[LoadedBatch]):
    """A map from a slot and a list of rows to a batch.

    Args:
        samples: to read.
        slots: uint8 ``[count, B, C, H, W]``, memory for the images.
        replace: True replaces a damaged sample by the next one of its shard that can be decoded, in cyclic order, with its own
            label and augmentation. So the replacement is a function of the row alone. False gives a black image.
    """

    def __init__(self, samples: ShardDataset, slots: Tensor, replace: bool) -> None:
        self._samples, self._slots, self._replace = samples, slots, replace

    def __getitem__(self, item: tuple[int, list[Row]]) -> LoadedBatch:
        """Loads the samples of the rows into the slot, and leaves the global generators as they were.

        Raises:
            DataError: a sample can't be read, or no sample of its shard can be decoded.
        """
        slot, rows = item
        labels, messages = [], []
        with restored_random_state():
            for place, row in zip(self._slots[slot], rows, strict=True):
                image, label, message = self._load_sample(row)
                if image is None:
                    place.zero_()
                else:
                    place.copy_(image)
                labels.append(label)
                messages.append(message)
        damaged = [message is not None for message in messages]
        return LoadedBatch(slot, labels, damaged, [message for message in messages if message is not None])

    def _load_sample(self, row: Row) -> tuple[Tensor | None, int, str | None]:
        """Returns image, label, and a message if the sample is damaged."""
        epoch, sample, copy = row
        try:
            return *self._samples.load_sample(row), None
        except DamagedSampleError as error:
            message = str(error)
        if not self._replace:
            return None, self._samples.label(sample), message
        for other in self._samples.others_of_shard(sample):
            try:
                return *self._samples.load_sample((epoch, other, copy)), message
            except DamagedSampleError:
                pass
        raise DataError(f"{message}, and no other sample of that shard can be decoded; write it again")
