"""Whole batches of samples, as loader processes make them; damaged samples are replaced or marked."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svite_scale.data.dataset import DamagedSampleError, Row, ShardDataset
from svite_scale.data.randomness import restored
from svite_scale.data.workers import LoaderContext, serve_trainer
from svite_scale.errors import DataError

PREFETCH = 2
"""Batches that each loader process makes in advance."""

MORE_ROOM = "give the job more memory, and more of /dev/shm (docker run --shm-size), or lower data.workers; 0 starts none"


class LoadedBatch(NamedTuple):
    """What a loader process tells of a batch, whose images it has put into a slot."""

    slot: int
    labels: list[int]
    damaged: list[bool]
    """Where the image couldn't be decoded."""
    reports: list[str]
    """One line for each damaged sample."""


def shared_slots(count: int, batch_shape: tuple[int, int, int, int]) -> Tensor:
    """Memory for the images of so many batches ``[B, C, H, W]``, shared with the processes that are forked from this one.

    It is anonymous: nothing is named, sent or opened for a batch, and the size of /dev/shm, small in containers, is no limit.

    Returns:
        uint8 ``[count, B, C, H, W]``, in memory pixel by pixel, as images come from Pillow.

    Raises:
        DataError: there isn't so much memory.
    """
    batch_size, channels, height, width = batch_shape
    shape = (count, batch_size, height, width, channels)
    size = math.prod(shape)
    try:
        memory = mmap.mmap(-1, size)
    except OSError as error:
        raise DataError(
            f"{count} batches of {batch_size} images need {size} bytes of memory, which can't be had ({error}); lower "
            "data.workers, or raise train.accumulation_steps, or for evaluation lower train.eval_batch_size"
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape).permute(0, 1, 4, 2, 3)


class BatchDataset(Dataset[LoadedBatch]):
    """A map from a slot and a list of rows to a batch.

    Args:
        samples: what they are read from.
        slots: uint8 ``[count, B, C, H, W]``, where the images go.
        substitute: another sample stands in for a damaged one: the next of its shard that can be decoded, in cyclic order, with
            its own label and augmentation, so it is a function of the row alone. Otherwise the image is black.
    """

    def __init__(self, samples: ShardDataset, slots: Tensor, substitute: bool) -> None:
        self._samples, self._slots, self._substitute = samples, slots, substitute

    def __getitem__(self, item: tuple[int, list[Row]]) -> LoadedBatch:
        """Leaves the global generators as they were.

        Raises:
            DataError: a sample can't be read, or no sample of its shard be decoded.
        """
        slot, rows = item
        labels, reports = [], []
        with restored():
            for place, row in zip(self._slots[slot], rows, strict=True):
                image, label, report = self._load(row)
                if image is None:
                    place.zero_()
                else:
                    place.copy_(image)
                labels.append(label)
                reports.append(report)
        damaged = [report is not None for report in reports]
        return LoadedBatch(slot, labels, damaged, [report for report in reports if report is not None])

    def _load(self, row: Row) -> tuple[Tensor | None, int, str | None]:
        """Image, label, and what is wrong with the sample, if anything."""
        epoch, sample, copy = row
        try:
            return *self._samples.load(row), None
        except DamagedSampleError as error:
            report = str(error)
        if not self._substitute:
            return None, self._samples.label(sample), report
        for other in self._samples.others_of_shard(sample):
            try:
                return *self._samples.load((epoch, other, copy)), report
            except DamagedSampleError:
                pass
        raise DataError(f"{report}, nor any other of that shard; write it again")


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
