"""``_info.json`` beside shards: timm can read it, and the shards that it lists must exist."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from svite_scale.data.format.files import replacing
from svite_scale.data.format.info import check_classes, write_info
from svite_scale.data.format.patterns import find_shards, load_indexes
from svite_scale.data.make.shards import write_shards
from svite_scale.errors import DataError
from tests.data.numbered import numbered
from tests.data.tars import make_tar


def write_split(folder: Path, split: str, count: int, classes: list[str] | None = None) -> list[Path]:
    shards = write_shards(numbered(count), folder, split, 4)
    write_info(shards, [index.count for index in load_indexes(f"{folder}/{split}-*.tar")], split, classes)
    return shards


def test_a_split_is_added_to_the_others(tmp_path: Path) -> None:
    write_split(tmp_path, "val", 6)
    write_split(tmp_path, "train", 9, ["a", "b"])
    splits = json.loads((tmp_path / "_info.json").read_text())["splits"]
    names = ["val-000000.tar", "val-000001.tar"]
    assert splits["val"] == {"name": "val", "num_samples": 6, "filenames": names, "shard_lengths": [4, 2]}
    assert splits["train"]["classes"] == ["a", "b"]
    assert splits["train"]["shard_lengths"] == [4, 4, 1]


def test_splits_written_at_the_same_time_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = threading.Thread(target=write_info, args=([tmp_path / "val-000000.tar"], [1], "val", None))

    @contextmanager
    def meanwhile(path: Path) -> Iterator[Path]:
        """Writes the other split between reading and writing of this one, unless a lock prevents it."""
        monkeypatch.setattr("svite_scale.data.format.info.replacing", replacing)
        other.start()
        other.join(timeout=0.3)
        with replacing(path) as temporary:
            yield temporary

    monkeypatch.setattr("svite_scale.data.format.info.replacing", meanwhile)
    write_info([tmp_path / "train-000000.tar"], [1], "train", None)
    other.join()
    assert set(json.loads((tmp_path / "_info.json").read_text())["splits"]) == {"train", "val"}


def test_classes_must_agree_where_they_are_known(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 4, ["a", "b"])
    check_classes(tmp_path, "val", ["a", "b"])
    check_classes(tmp_path, "val", None)
    check_classes(tmp_path, "train", ["b", "a"])
    with pytest.raises(DataError, match="holds train with 2 classes, and val has 2, not all the same in the same order"):
        check_classes(tmp_path, "val", ["b", "a"])


def split_of(**fields: object) -> str:
    return json.dumps({"splits": {"train": fields}})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"splits": 3}',
        '{"splits": null}',
        '{"splits": {"train": 3}}',
        split_of(filenames=None),
        split_of(filenames=7),
        split_of(filenames=[7]),
        split_of(filenames="train-000000.tar"),
        split_of(classes=2),
        "{",
        "[" * 200_000,
    ],
)
def test_a_file_of_another_kind_is_never_overwritten_and_does_not_hinder_training(tmp_path: Path, text: str) -> None:
    shards = write_shards(numbered(4), tmp_path, "train", 2)
    (tmp_path / "_info.json").write_text(text)
    with pytest.raises(DataError, match=r"_info\.json is not a list of splits"):
        write_info(shards, [2, 2], "train", None)
    assert (tmp_path / "_info.json").read_text() == text
    assert find_shards(str(tmp_path), "data.train") == shards


def test_a_missing_shard_is_named_by_every_pattern_that_includes_it(tmp_path: Path) -> None:
    train, val = write_split(tmp_path, "train", 12), write_split(tmp_path, "val", 8)
    train[1].unlink()
    for pattern in ("", "/*.tar", "/train-*.tar", "/train-00000[0-9].tar", "/{train,val}-*.tar"):
        with pytest.raises(DataError, match=r"data\.train = .*: \S+/train-000001\.tar is missing, which _info\.json lists"):
            find_shards(f"{tmp_path}{pattern}", "data.train")
    with pytest.raises(DataError, match=r"no shard matches '\S+/train-000001\.tar'"):
        find_shards(f"{tmp_path}/train-{{000000..000002}}.tar", "data.train")
    assert find_shards(f"{tmp_path}/val-*.tar", "data.val") == val
    assert find_shards(f"{tmp_path}/train-00000[02].tar", "data.train") == [train[0], train[2]]


def test_compressed_shards_in_a_folder_are_refused(tmp_path: Path) -> None:
    shards = write_shards(numbered(4), tmp_path, "train", 2)
    make_tar(tmp_path / "train-000002.tar.gz", [("a.png", b"x"), ("a.cls", b"1")], mode="w:gz")
    with pytest.raises(DataError, match=r"train-000002\.tar\.gz is compressed; unpack it"):
        find_shards(str(tmp_path), "data.train")
    assert find_shards(f"{tmp_path}/*.tar", "data.train") == shards
