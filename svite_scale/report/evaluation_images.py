"""A few of a run's evaluation images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from svite_scale.config.schema import Config
from svite_scale.data.dataset import ShardDataset
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.transforms import DeviceTransform, eval_transform
from svite_scale.errors import DataError


class EvaluationImages(NamedTuple):
    """Images as evaluation sees them.

    Attributes:
        samples: int64 ``[B]``, their numbers among all evaluation samples.
        labels: int64 ``[B]``.
        pixels: uint8 ``[B, C, H, W]``.
        inputs: what the model takes, fp32 ``[B, C, H, W]``.
    """

    samples: Tensor
    labels: Tensor
    pixels: Tensor
    inputs: Tensor


def evaluation_images(config: Config, count: int) -> EvaluationImages:
    """Up to ``count`` of the evaluation images, spread evenly over the shards, which are often sorted by class.

    Raises:
        DataError: the shards can't be read, or hold no sample.
    """
    data, model = config.data, config.model
    indexes = load_indexes(data.val, "data.val", data)
    transform = eval_transform(data, model.image_size)
    dataset = ShardDataset(indexes, transform, model.in_channels, seed=0, max_pixels=data.max_pixels)
    if not len(dataset):
        raise DataError(f"data.val = {data.val!r} holds no samples; write shards that do")
    samples = np.arange(min(count, len(dataset))) * len(dataset) // min(count, len(dataset))
    pixels, labels = zip(*(dataset[0, sample, 0] for sample in samples.tolist()), strict=True)
    images, targets = torch.stack(pixels), torch.tensor(labels)
    inputs, _ = DeviceTransform(data, model.num_classes, torch.device("cpu"), training=False)(images, targets)
    return EvaluationImages(torch.from_numpy(samples), targets, images, inputs)
