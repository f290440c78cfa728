"""Whole batches of samples, as loader processes make them; damaged samples are replaced or marked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from svite_scale.data.dataset import DamagedSampleError, Row, ShardDataset
from svite_scale.data.randomness import restored
from svite_scale.errors import DataError


class LoadedBatch(NamedTuple):
    """A batch on its way from a loader process."""

    images: Tensor
    """uint8 ``[B, C, H, W]``"""
    labels: Tensor
    """int64 ``[B]``"""
    damaged: Tensor
    """bool ``[B]``: True where the image couldn't be decoded."""
    reports: list[str]
    """One line for each damaged sample."""


class BatchDataset(Dataset[LoadedBatch]):
    """A map from lists of rows to batches.

    Args:
        samples: what they are read from.
        image_shape: of a transformed image, (C, H, W).
        substitute: another sample stands in for a damaged one: the next of its shard that can be decoded, in cyclic order, with
            its own label and augmentation, so it is a function of the row alone. Otherwise the image is black.
    """

    def __init__(self, samples: ShardDataset, image_shape: tuple[int, int, int], substitute: bool) -> None:
        self._samples, self._image_shape, self._substitute = samples, image_shape, substitute

    def __getitem__(self, rows: list[Row]) -> LoadedBatch:
        """Leaves the global generators as they were.

        Raises:
            DataError: a sample can't be read, or no sample of its shard be decoded.
        """
        with restored():
            loaded = [self._load(row) for row in rows]
        # In a loader process this puts the images into shared memory, copying each once.
        images = default_collate([image for image, _, _ in loaded])
        labels = torch.tensor([label for _, label, _ in loaded])
        reports = [report for _, _, report in loaded]
        damaged = torch.tensor([report is not None for report in reports])
        return LoadedBatch(images, labels, damaged, [report for report in reports if report is not None])

    def _load(self, row: Row) -> tuple[Tensor, int, str | None]:
        """Image, label, and what is wrong with the sample, if anything."""
        epoch, sample, copy = row
        try:
            return *self._samples.load(row), None
        except DamagedSampleError as error:
            report = str(error)
        if not self._substitute:
            return torch.zeros(self._image_shape, dtype=torch.uint8), self._samples.label(sample), report
        for other in self._samples.others_of_shard(sample):
            try:
                return *self._samples.load((epoch, other, copy)), report
            except DamagedSampleError:
                pass
        raise DataError(f"{report}, nor any other of that shard; write it again")
