"""The index finds every image; patterns and damaged files fail with what to do."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from svite_scale.data import load_indexes, write_shards
from svite_scale.data.index import build_index, load_index, save_index, sidecar_path, write_missing_indexes
from svite_scale.errors import DataError
from tests.data.numbered import numbered, picture


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar as another tool would write it."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def test_offsets_lead_to_the_images(tmp_path: Path) -> None:
    samples = numbered(5)
    (shard,) = write_shards(samples, tmp_path, "train", 10)
    index = load_index(shard)
    content = shard.read_bytes()
    assert index.count == 5
    assert index.size == len(content)
    for position, sample in enumerate(samples):
        start, length = index.offsets[position], index.lengths[position]
        assert content[start : start + length] == sample.image
        assert index.labels[position] == sample.label
        assert index.key(position) == sample.key


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_tools(tmp_path: Path, format: int) -> None:
    long = "klass/" + "n" * (150 if format != tarfile.USTAR_FORMAT else 80)
    first, second = picture(1, "jpg"), picture(2)
    members = [
        ("__index__", b"not a sample"),
        (f"{long}.JPEG", first),
        (f"{long}.json", b"{}"),
        (f"{long}.cls", b" 12\n"),
        ("zwei-ü.cls", b"3"),
        ("zwei-ü.png", second),
    ]
    shard = make_tar(tmp_path / "other.tar", members, format)
    index = build_index(shard)
    content = shard.read_bytes()
    assert [index.key(i) for i in range(index.count)] == [long, "zwei-ü"]
    assert index.labels.tolist() == [12, 3]
    assert [content[o : o + n] for o, n in zip(index.offsets, index.lengths, strict=True)] == [first, second]
    save_index(index)
    loaded = load_index(shard)
    for column in ("offsets", "lengths", "labels", "keys"):
        built = getattr(index, column)
        assert built.dtype == getattr(loaded, column).dtype
        np.testing.assert_array_equal(built, getattr(loaded, column))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], "'a' has no label"),
        ([("a.cls", b"1")], "'a' has no image"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "'a' has two images"),
        ([("a.png", b"x"), ("a.cls", b"cat")], "a.cls holds b'cat'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "class number from 0"),
        ([("a.png", b"x"), ("a.cls", b"1" * 30)], "class number from 0"),
    ],
)
def test_incomplete_samples(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_index(make_tar(tmp_path / "bad.tar", members))


@pytest.mark.parametrize("keep", [2.5, 4.2, 6])
def test_a_cut_off_tar_is_refused(tmp_path: Path, keep: float) -> None:
    members = [(f"{i}.{kind}", b"1" + b" " * 599) for i in range(2) for kind in ("png", "cls")]
    shard = make_tar(tmp_path / "cut.tar", members)
    shard.write_bytes(shard.read_bytes()[: int(keep * 512)])
    with pytest.raises(DataError, match=r"cut\.tar"):
        build_index(shard)


def test_a_damaged_header_is_refused_not_taken_for_the_end(tmp_path: Path) -> None:
    (shard,) = write_shards(numbered(5), tmp_path, "train", 10)
    content = bytearray(shard.read_bytes())
    content[4 * 512 + 100] ^= 0xFF  # in the third member's header
    shard.write_bytes(content)
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 2  # what goes unnoticed without the check
    with pytest.raises(DataError, match="damaged or cut off near byte 2048"):
        build_index(shard)


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar\n" * 200)
    with pytest.raises(DataError, match="not a readable, uncompressed tar"):
        build_index(tmp_path / "text.tar")


def test_patterns(tmp_path: Path) -> None:
    shards = write_shards(numbered(12), tmp_path, "train", 4)

    def names(pattern: str) -> list[str]:
        return [index.path.name[6:12] for index in load_indexes(f"{tmp_path}{pattern}")]

    assert names("/train-{000000..000002}.tar") == ["000000", "000001", "000002"]
    assert names("/train-{000002..000001}.tar") == ["000001", "000002"]
    assert names("/train-*.tar") == names("") == names("/{train-00000[01].tar,train-*.tar}") == ["000000", "000001", "000002"]
    bracketed = tmp_path / "[run]"
    write_shards(numbered(1), bracketed, "train", 4)
    assert [index.path for index in load_indexes(str(bracketed))] == [bracketed / shards[0].name]
    assert len(load_indexes(f"{bracketed}/train-000000.tar")) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "data.train is empty"),
        ("/train-{000000..000003}.tar", r"no shard matches '.*train-000003\.tar'"),
        ("/val-*.tar", "no shard matches"),
        ("/nowhere", "no shard matches"),
        ("/train-{000000..000003.tar", "unbalanced braces"),
    ],
)
def test_patterns_that_fail(tmp_path: Path, pattern: str, message: str) -> None:
    write_shards(numbered(12), tmp_path, "train", 4)
    with pytest.raises(DataError, match=message):
        load_indexes(f"{tmp_path}{pattern}" if pattern else "", "data.train")


def test_an_empty_folder_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shard matches"):
        load_indexes(str(tmp_path))


def test_missing_stale_and_broken_indexes_name_the_remedy_and_are_rewritten(tmp_path: Path) -> None:
    missing, stale, broken, other, fine = write_shards(numbered(10), tmp_path, "train", 2)
    sidecar_path(missing).unlink()
    with stale.open("ab") as file:
        file.write(bytes(512))
    sidecar_path(broken).write_text('{"format": 1, "size":')
    sidecar_path(other).write_text('{"format": 2}')
    for shard, message in [
        (missing, "has no index"),
        (stale, "is stale"),
        (broken, "not a readable index"),
        (other, "format 2"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_index(shard)
        assert f"python launch/make_shards.py --index '{shard}'" in str(caught.value)
    before = sidecar_path(fine).stat().st_mtime_ns
    assert write_missing_indexes(str(tmp_path)) == [sidecar_path(shard) for shard in (missing, stale, broken, other)]
    assert [index.count for index in load_indexes(str(tmp_path))] == [2] * 5
    assert sidecar_path(fine).stat().st_mtime_ns == before
    assert write_missing_indexes(str(tmp_path)) == []
