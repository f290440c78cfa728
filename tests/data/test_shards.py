"""webdataset can read written shards; they are complete, and have the same bytes every time."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from svite_scale.data.make.shards import Sample, write_shards
from svite_scale.errors import DataError
from tests.data.numbered import numbered, picture


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    samples = [*numbered(7), Sample("folder/photo", picture(9, "jpg", mode="RGB"), "jpg", 3)]
    shards = write_shards(samples, tmp_path, "train", 3)
    assert [shard.name for shard in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    read = list(dataset)
    assert [sample["__key__"] for sample in read] == [sample.key for sample in samples]
    assert [int(sample["cls"]) for sample in read] == [sample.label for sample in samples]
    assert [sample[extension] for sample, extension in zip(read, ["png"] * 7 + ["jpg"], strict=True)] == [
        sample.image for sample in samples
    ]
    assert Image.open(BytesIO(read[-1]["jpg"])).size == (8, 8)


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    first = write_shards(numbered(5), tmp_path / "a", "train", 3)
    again = write_shards(iter(numbered(5)), tmp_path / "b", "train", 3)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    with tarfile.open(first[0]) as tar:
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}


def test_an_interrupted_write_leaves_only_complete_shards(tmp_path: Path) -> None:
    def breaks() -> Iterator[Sample]:
        yield from numbered(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(breaks(), tmp_path, "train", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-000000.tar", "train-000000.tar.index.json"]


def test_a_rewritten_shard_never_keeps_its_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(numbered(3), tmp_path, "train", 3)

    def killed(shard: Path, source_digest: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svite_scale.data.make.shards.build_index", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(list(reversed(numbered(3))), tmp_path, "train", 3)  # a tar of the same size
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", b"", "png", 0), "dots"),
        (Sample("", b"", "png", 0), "dots"),
        (Sample("__meta__", b"", "png", 0), "__name__"),
        (Sample("k" * 91, b"", "png", 0), "longer than 90"),
        (Sample("a", b"", "bmp", 0), "extension 'bmp'"),
        (Sample("a", b"", "png", -1), "label -1"),
    ],
)
def test_samples_that_webdataset_would_misread_are_refused(tmp_path: Path, sample: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shards([sample], tmp_path, "train", 3)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_key_and_extension_fit(tmp_path: Path) -> None:
    key = "d" * 45 + "/" + "k" * 44
    (shard,) = write_shards([Sample(key, picture(1, "jpeg"), "jpeg", 0)], tmp_path, "train", 3)
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)] == [key]


def test_no_samples_and_empty_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path, "train", 3)
    with pytest.raises(DataError, match="samples_per_shard is 0"):
        write_shards(numbered(1), tmp_path, "train", 0)


def test_shards_of_an_earlier_longer_output_are_reported(tmp_path: Path) -> None:
    write_shards(numbered(9), tmp_path, "train", 3)
    write_shards(numbered(3), tmp_path, "train-extra", 3)
    with pytest.raises(DataError, match=r"train-000002\.tar remains"):
        write_shards(numbered(6), tmp_path, "train", 3)
