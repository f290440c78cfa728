"""Tiny samples whose first pixel is the sample's number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from svite_scale.data.loader import Batch, EvalData, TrainData
from svite_scale.data.make.shards import Sample, Source, write_shards
from svite_scale.data.options import DataConfig
from svite_scale.runtime.world import World

SIZE = 8
NUM_LABELS = 7


def picture(value: int, extension: str = "png", mode: str = "L") -> bytes:
    """An encoded image of one grey value."""
    return encoded(Image.new("L", (SIZE, SIZE), value).convert(mode), extension)


def speckled(value: int) -> bytes:
    """A PNG of noise that begins with ``value``; unlike an even image, it changes when it is moved."""
    pixels = np.random.RandomState(value).randint(256, size=(SIZE, SIZE)).astype(np.uint8)
    pixels[0, 0] = value
    return encoded(Image.fromarray(pixels), "png")


def encoded(image: Image.Image, extension: str) -> bytes:
    content = BytesIO()
    image.save(content, {"jpg": "jpeg"}.get(extension, extension))
    return content.getvalue()


def numbered(count: int) -> list[Sample]:
    """``count`` samples; the PNG of number i begins with i and has label i % NUM_LABELS."""
    return [Sample(f"sample-{i:03d}", speckled(i), "png", i % NUM_LABELS) for i in range(count)]


def samples_of(source: Source) -> list[Sample]:
    """All samples of a source, in order."""
    return [source.sample(number) for number in range(len(source.keys))]


def write_numbered(directory: Path, count: int, per_shard: int, prefix: str = "train") -> str:
    """Writes ``count`` numbered samples and returns their pattern."""
    write_shards(numbered(count), directory, prefix, per_shard)
    return f"{directory}/{prefix}-*.tar"


def grey_config(**fields: object) -> DataConfig:
    return DataConfig(mean=(0.5,), std=(0.5,), eval_crop=1.0, **fields)  # type: ignore[arg-type]


def train_data(
    config: DataConfig, batch: int, accumulation: int = 1, rank: int = 0, world: int = 1, seed: int = 3
) -> TrainData:
    return TrainData(
        config,
        image_shape=(1, SIZE, SIZE),
        global_batch_size=batch,
        seed=seed,
        accumulation_steps=accumulation,
        world=World(rank=rank, size=world),
    )


def eval_data(config: DataConfig, batch: int, rank: int = 0, world: int = 1) -> EvalData:
    return EvalData(config, image_shape=(1, SIZE, SIZE), batch_size=batch, world=World(rank=rank, size=world))


def assert_same_batches(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def image_bytes(batches: Iterable[Batch], damaged: bool = False) -> Counter[bytes]:
    """The images of the batches' samples that are marked as damaged, or of the others."""
    return Counter(image.numpy().tobytes() for batch in batches for image in batch.images[batch.damaged == damaged])


def numbers(batch: Batch) -> list[int]:
    """Returns the numbers of an unaugmented batch's samples; also checks shapes, dtypes and labels."""
    size = len(batch.labels)
    assert batch.images.shape == (size, 1, SIZE, SIZE)
    assert str(batch.images.dtype) == "torch.uint8"
    assert str(batch.labels.dtype) == "torch.int64"
    assert batch.valid.shape == (size,)
    found = batch.images[:, 0, 0, 0].tolist()
    assert batch.labels.tolist() == [number % NUM_LABELS for number in found]
    return found
