"""The webdataset library and timm's reader read the shards that the command writes, completely and with equal labels."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_wds import ReaderWds

from launch import make_shards
from tests.data.numbered import picture

Samples = Counter[tuple[int, int]]
"""Grey value and label of each."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Samples]]:
    """Shards of an image folder with JPEG and PNG, by split, in one folder; and their expected samples."""
    root = tmp_path_factory.mktemp("written")
    expected: dict[str, Samples] = {"train": Counter(), "val": Counter()}
    for split, count in (("train", 23), ("val", 9)):
        for number in range(count):
            label, extension = number % 3, ("JPEG", "png", "jpg")[number % 2 + number % 5 // 4]
            path = root / split / f"class{label}" / f"{number}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(8 * number, "png" if extension == "png" else "jpg"))
            expected[split][8 * number, label] += 1
        arguments = ["--source", str(root / split), "--out", str(root / "shards"), "--prefix", split]
        assert make_shards.main([*arguments, "--samples-per-shard", "5", "--workers", "2"]) == 0
    return root / "shards", expected


def grey(image: Image.Image) -> int:
    return int(np.array(image.convert("L"))[0, 0])


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_reads_our_shards(written: tuple[Path, dict[str, Samples]], split: str) -> None:
    folder, expected = written
    shards = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    plain = webdataset.WebDataset(shards, shardshuffle=False)
    found = [(grey(Image.open(BytesIO(sample.get("jpg") or sample["png"]))), int(sample["cls"])) for sample in plain]
    assert Counter(found) == expected[split]
    decoded = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls")
    assert Counter((grey(image), label) for image, label in decoded) == expected[split]


@pytest.mark.parametrize("split", ["train", "val"])
def test_timm_reads_our_shards_for_evaluation(
    written: tuple[Path, dict[str, Samples]], split: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It finds the split's name in ``_info.json``, as its training script does with ``--dataset wds/``."""
    folder, expected = written
    dataset = create_dataset("wds/", root=str(folder), split=split, batch_size=4)
    assert len(dataset) == sum(expected[split].values())
    assert Counter((grey(image), label) for image, label in dataset) == expected[split]
    assert not caplog.records  # it logs what it drops


def test_timm_reads_our_shards_for_training(written: tuple[Path, dict[str, Samples]]) -> None:
    """It shuffles; an epoch is as long as the split."""
    folder, expected = written
    reader = ReaderWds(str(folder), split="train", is_training=True, batch_size=1)
    assert Counter((grey(image), label) for image, label in reader) == expected["train"]


def test_timm_reads_our_shards_by_pattern(written: tuple[Path, dict[str, Samples]]) -> None:
    folder, expected = written
    reader = ReaderWds(str(folder), split="val-{000000..000001}.tar|9")
    assert Counter((grey(image), label) for image, label in reader) == expected["val"]
