"""The index finds every image; patterns and damaged files fail with what to do."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svite_scale.data import load_indexes, write_shards
from svite_scale.data.index import (
    build_index,
    check_contents,
    damage,
    is_indexed,
    largest_label,
    load_index,
    parse_index,
    save_index,
    sidecar_path,
)
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
    built, left_out = build_index(shard, plan="of mine")
    assert not left_out
    save_index(built)
    loaded = load_index(shard)
    assert (loaded.size, loaded.sha256, loaded.plan, loaded.keys) == (built.size, built.sha256, "of mine", names)
    assert loaded.lengths.tolist() == [2, 2, 0, 3]
    for column in ("offsets", "lengths", "labels"):
        assert getattr(built, column).dtype == getattr(loaded, column).dtype
        np.testing.assert_array_equal(getattr(built, column), getattr(loaded, column))


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
def test_patterns_that_fail(tmp_path: Path, pattern: str, message: str) -> None:
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
    ],
)
def test_texts_that_are_no_index(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    text = changed(tmp_path, **fields)
    with pytest.raises(DataError, match=rf"^the index .*{message}"):
        parse_index(text, tmp_path / "a.tar", "the index", "again")


@pytest.mark.parametrize("text", ["", "[]", "7", '{"format": 2, "size":'])
def test_texts_that_are_no_record(text: str) -> None:
    with pytest.raises(DataError, match=r"the index is not a readable index .*; again"):
        parse_index(text, Path("a.tar"), "the index", "again")


def test_damage_that_keeps_the_size_shows_in_the_checksum(tmp_path: Path) -> None:
    fine, flipped, cut = write_shards(numbered(6), tmp_path, "train", 2)
    overwrite(flipped, 700, bytes([flipped.read_bytes()[700] ^ 1]))
    os.truncate(cut, 600)
    assert load_index(flipped).count == 2  # at start only sizes are compared
    assert damage(fine) == ""
    assert "train-000001.tar is damaged, or its index is stale: its checksum is" in damage(flipped)
    assert "stale: it describes a tar of" in damage(cut)
    cut.unlink()
    assert "can't be read" in damage(cut)


def test_ranks_verify_checksums_of_a_share_each(tmp_path: Path) -> None:
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
