"""Options of the data: the shards, their order, their cache, and the transforms."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from svite_scale.options import options


@options
class AugmentConfig:
    """Training-time augmentation. ``deit`` is the DeiT recipe through timm; ``affine`` is light and suits digits."""

    recipe: Literal["none", "affine", "deit"] = "none"
    """``none`` only resizes."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's policy string, for ``recipe: deit``."""
    random_erasing: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Probability that a rectangle of an image is filled with noise; 0 is off."""
    mixup: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of mixup's beta distribution; 0 is off."""
    cutmix: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of cutmix's beta distribution; 0 is off. If both are on, each micro-batch takes one of them at random."""
    label_smoothing: Annotated[float, Field(ge=0.0, le=0.99)] = 0.0
    """Fraction of a label's weight that is spread over all classes."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Repeated augmentation: copies of a sample in an epoch, whose length stays the same."""


@options
class DataConfig:
    """Tar shards with their index sidecars, as ``launch/make_shards.py`` writes them."""

    train: str = ""
    """Brace pattern, glob, or folder of the training shards; or a brace pattern of URLs: ``http(s)://``, ``s3://``, ``gs://``
    or ``pipe:COMMAND``."""
    val: str = ""
    """The same for the evaluation shards."""
    verify_checksums: bool = False
    """At the start, read all shards and compare them with the checksums in their indexes; each rank takes its part."""
    cache_dir: str | None = None
    """Folder of fetched shards, on a disk of each machine; null is the user's folder in the system's temporary folder."""
    cache_gb: Annotated[float, Field(gt=0.0)] = 24.0
    """Most bytes in that folder, in 10^9; the least recently used shards are removed. If there is room for two shuffle groups
    (``shuffle_shards``), the next group is fetched while one is read."""
    fetch_attempts: Annotated[int, Field(ge=1)] = 5
    """Attempts to fetch a shard or an index."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank."""
    shuffle_shards: Annotated[int, Field(ge=1)] = 64
    """Samples are shuffled within shuffle groups of this many (permuted) shards."""
    last_batch: Literal["drop", "carry"] = "drop"
    """An epoch's last samples that don't fill a global batch: left out, or first in the next epoch's first batch."""
    max_damaged: Annotated[float, Field(ge=0.0, le=1.0)] = 0.001
    """Largest allowed fraction of undecodable samples, measured over at least 10,000; at 0 the first one ends the run."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Pixels of the largest image that is decoded; a row counts as at least 64. Larger images count as damaged. A loader
    process takes up to 10 bytes per pixel."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, for pixels in 0..1."""
    std: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.229, 0.224, 0.225)
    """Per channel, in the same unit; pixels are normalised to (pixel - mean) / std."""
    eval_crop: Annotated[float, Field(gt=0.0, le=1.0)] = 0.875
    """Centre crop at evaluation, as a fraction of the resized image (224 of 256)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
