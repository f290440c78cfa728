"""The index finds every image; bad patterns and damaged files fail with a remedy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from svite_scale.data.format.index import (
    DAY_NS,
    build_index,
    confirm_index,
    find_damage,
    is_indexed,
    load_index,
    parse_index,
    save_index,
    sidecar_path,
)
from svite_scale.data.format.patterns import check_contents, find_shards, largest_label, load_indexes
from svite_scale.data.make.shards import write_shards
from svite_scale.errors import DataError
from tests.data.numbered import numbered
from tests.data.tars import make_tar, overwrite


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
    assert index.keys == [sample.key for sample in samples]
    assert index.sha256 == hashlib.sha256(content).hexdigest()


def test_a_sidecar_gives_back_what_was_saved(tmp_path: Path) -> None:
    contents = {"zwei-ü": b"xy", "a/b": b"xy", "empty": b"", "caf\udce9": b"xyz"}
    names = list(contents)
    shard = make_tar(
        tmp_path / "a.tar", [part for name in names for part in ((f"{name}.png", contents[name]), (f"{name}.cls", b"3"))]
    )
    built, left_out = build_index(shard, source_digest="of mine")
    assert not left_out
    save_index(built)
    loaded = load_index(shard)
    assert (loaded.size, loaded.sha256, loaded.source_digest, loaded.keys) == (built.size, built.sha256, "of mine", names)
    assert loaded.lengths.tolist() == [2, 2, 0, 3]
    for column in ("offsets", "lengths", "labels"):
        assert getattr(built, column).dtype == getattr(loaded, column).dtype
        np.testing.assert_array_equal(getattr(built, column), getattr(loaded, column))


def test_a_pattern_names_its_shards(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"no shard matches '.*' \(in a glob, a \[ of a name is written \[\[\]\); correct it"):
        load_indexes(f"{bracketed}/train-*.tar")
    assert len(load_indexes(f"{tmp_path}/[[]run]/train-*.tar")) == 1


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
def test_bad_patterns_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    write_shards(numbered(12), tmp_path, "train", 4)
    with pytest.raises(DataError, match=message):
        load_indexes(f"{tmp_path}{pattern}" if pattern else "", "data.train")


def test_an_empty_folder_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shard matches"):
        load_indexes(str(tmp_path))


def test_what_is_wrong_with_an_index_names_the_remedy(tmp_path: Path) -> None:
    missing, stale, gone, binary = write_shards(numbered(8), tmp_path, "train", 2)
    sidecar_path(missing).unlink()
    with stale.open("ab") as file:
        file.write(bytes(512))
    gone.unlink()
    sidecar_path(binary).write_bytes(b"\xff\xfe")
    for shard, message in [
        (missing, "has no index"),
        (stale, f"is stale: it describes a tar of {stale.stat().st_size - 512} bytes, train-000001.tar has"),
        (gone, "can't be read"),
        (binary, "can't be read"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_index(shard)
        assert f"python launch/make_shards.py --index '{shard}'" in str(caught.value)
        assert not is_indexed(shard)


def changed(tmp_path: Path, **fields: Any) -> str:
    """The sidecar of two samples with some fields replaced; None removes one."""
    (shard,) = write_shards(numbered(2), tmp_path, "train", 2)
    record = {**json.loads(sidecar_path(shard).read_text()), **fields}
    return json.dumps({name: value for name, value in record.items() if value is not None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 1}, "has format 1, this version reads 2; again"),
        ({"format": 3}, "has format 3"),
        ({"format": None}, "KeyError"),
        ({"sha256": None}, "KeyError"),
        ({"keys": ["a"]}, "unequal length"),
        ({"offsets": [512, 10**9]}, "beyond the tar's end"),
        ({"lengths": [5, -1]}, "negative"),
        ({"labels": [-1, 0]}, "negative"),
        ({"labels": ["a", "b"]}, "ValueError"),
        ({"lengths": [5, 2**40]}, "OverflowError"),
        ({"size": "many"}, "ValueError"),
        ({"offsets": [2**63 - 1, 512]}, "beyond the tar's end"),
        ({"offsets": [2**63, 512]}, "OverflowError"),
        ({"offsets": [512.5, 1024]}, "512.5' where only int may stand"),
        ({"offsets": ["512", 1024]}, "'512' where only int"),
        ({"offsets": {"a": 1, "b": 2}}, "for a list"),
        ({"labels": [True, 0]}, "'True' where only int"),
        ({"labels": [2**31, 0]}, "OverflowError"),
        ({"labels": [float("nan"), 0]}, "'nan' where only int"),
        ({"labels": [[0], [1]]}, "where only int"),
        ({"keys": [1, 2]}, "'1' where only str"),
        ({"keys": ["a\0b", "c"]}, "zero byte"),
        ({"size": 10**30}, "OverflowError"),
        ({"size": -1}, "beyond the tar's end"),
    ],
)
def test_a_text_that_is_no_index_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    text = changed(tmp_path, **fields)
    with pytest.raises(DataError, match=rf"^the index .*{message}"):
        parse_index(text, tmp_path / "a.tar", "the index", "again")


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"format": 2, "size":', "[" * 200_000, '{"format": 2, "size": 1' + "0" * 5000 + "}"]
)
def test_a_text_that_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"the index is not a readable index .*; again"):
        parse_index(text, Path("a.tar"), "the index", "again")


def test_the_checksum_shows_damage_that_keeps_the_size(tmp_path: Path) -> None:
    fine, flipped, cut = write_shards(numbered(6), tmp_path, "train", 2)
    overwrite(flipped, 700, bytes([flipped.read_bytes()[700] ^ 1]))
    os.truncate(cut, 600)
    assert load_index(flipped).count == 2  # at start only sizes are compared
    assert find_damage(fine) == ""
    assert "train-000001.tar is damaged, or its index is stale: its checksum is" in find_damage(flipped)
    assert "stale: it describes a tar of" in find_damage(cut)
    cut.unlink()
    assert "can't be read" in find_damage(cut)


def test_each_rank_verifies_the_checksums_of_some_shards(tmp_path: Path) -> None:
    shards = write_shards(numbered(10), tmp_path, "train", 2)
    indexes = load_indexes(str(tmp_path))
    for rank in range(3):
        check_contents(indexes, rank, 3)
    overwrite(shards[4], 700, bytes([shards[4].read_bytes()[700] ^ 1]))
    for rank in (0, 2):
        check_contents(indexes, rank, 3)
    with pytest.raises(DataError, match=r"train-000004\.tar is damaged"):
        check_contents(indexes, 1, 3)


def test_the_largest_label_is_named(tmp_path: Path) -> None:
    write_shards(numbered(10), tmp_path, "train", 4)
    assert largest_label(load_indexes(str(tmp_path))) == (6, f"sample 'sample-006' of {tmp_path / 'train-000001.tar'}")
    assert largest_label([]) == (-1, "no sample")


def test_indexes_are_compact_in_memory(tmp_path: Path) -> None:
    """A million samples must fit each rank's memory many times over."""
    (shard,) = write_shards(numbered(200), tmp_path, "train", 200)
    index = load_index(shard)
    assert index.offsets.nbytes + index.lengths.nbytes + index.labels.nbytes == 16 * 200
    assert len(index.packed_keys) < 5 * 200  # of 10 each


def write_labels(shard: Path, labels: list[int], seconds: int) -> None:
    """A tar of samples with these labels and this modification time in seconds."""
    make_tar(shard, [part for i, n in enumerate(labels) for part in ((f"{i}.jpg", b"x"), (f"{i}.cls", str(n).encode()))])
    os.utime(shard, ns=(seconds * 10**9 + 123456789,) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("later", [-100, 100])
def test_a_tar_is_indexed_again_when_it_changed_at_equal_size(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], later: int
) -> None:
    """Also if the new tar is older."""
    changed, kept = tmp_path / "a.tar", tmp_path / "b.tar"
    for shard in (changed, kept):
        write_labels(shard, [1, 2], 10**9)
    assert command.main(["--index", str(tmp_path)]) == 0
    index = sidecar_path(kept).read_bytes()
    write_labels(changed, [0, 1], 10**9 + later)
    os.utime(kept, ns=(2 * 10**18, 2 * 10**18))  # touched only
    capsys.readouterr()
    assert command.main(["--index", str(tmp_path), "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 indexes are written: 2 samples",
        "1 of them had an index of the same size but another content, a.tar the first",
    ]
    assert load_index(changed).labels.tolist() == [0, 1]
    assert sidecar_path(kept).read_bytes() == index
    assert command.main(["--index", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "every shard has its index already\n"


def copy_with_times(source: Path, target: Path) -> None:
    for path in filter(Path.is_file, list(source.iterdir())):
        shutil.copy2(path, target / path.name)


def copy_with_whole_seconds(source: Path, target: Path) -> None:
    copy_with_times(source, target)
    for path in target.iterdir():
        seconds = path.stat().st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(seconds, seconds))


def copy_without_times(source: Path, target: Path) -> None:
    """The indexes come first, the tars an hour later."""
    for hours, ending in enumerate((".json", ".tar")):
        for path in source.glob(f"*{ending}"):
            shutil.copyfile(path, target / path.name)
            time = 10**18 + hours * 3600 * 10**9 + 987654321
            os.utime(target / path.name, ns=(time, time))


@pytest.mark.parametrize("copy", [None, copy_with_times, copy_with_whole_seconds, copy_without_times])
def test_a_start_warns_of_a_tar_that_is_newer_than_its_index_but_not_of_a_copy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, copy: Callable[[Path, Path], None] | None
) -> None:
    shards = write_shards(numbered(6), tmp_path, "train", 2)
    if copy is not None:
        (tmp_path / "copy").mkdir()
        copy(tmp_path, tmp_path / "copy")
        shards = [tmp_path / "copy" / shard.name for shard in shards]
    load_indexes(str(shards[0].parent), "data.train")
    assert not caplog.records
    for shard in shards[1:]:
        later = shard.stat().st_mtime_ns + 2 * DAY_NS
        os.utime(shard, ns=(later, later))
    load_indexes(str(shards[0].parent), "data.train")
    (record,) = caplog.records
    assert "2 shards are newer than their indexes (train-000001.tar is the first)" in record.getMessage()
    assert f"make_shards.py --index '{shards[0].parent}'" in record.getMessage()
    assert all(confirm_index(shard) for shard in shards)
    caplog.clear()
    load_indexes(str(shards[0].parent), "data.train")
    assert not caplog.records


def test_an_index_that_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    (shard,) = write_shards(numbered(2), tmp_path, "train", 2)
    sidecar_path(shard).unlink()
    os.mkfifo(sidecar_path(shard))
    with pytest.raises(DataError, match="is no ordinary file"):
        load_index(shard)
    os.mkfifo(tmp_path / "_info.json")
    assert find_shards(str(tmp_path), "data.train") == [shard]
