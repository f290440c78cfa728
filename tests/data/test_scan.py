"""Tars of other tools are read as they are; a tar that would lose a sample is refused with a remedy."""

from __future__ import annotations

import gzip
import subprocess
import tarfile
from pathlib import Path

import pytest

from svite_scale.data.format.labels import LabelRule
from svite_scale.data.format.scan import scan_tar
from svite_scale.data.make.shards import write_shards
from svite_scale.errors import DataError
from tests.data.numbered import numbered, picture
from tests.data.tars import BLOCK, make_tar, overwrite

SYNSETS = {"n01440764": 0, "n01443537": 1}


def labels(shard: Path, rule: LabelRule | None = None) -> dict[str, int]:
    return {sample.key: sample.label for sample in scan_tar(shard, rule).samples}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_tools_are_read(tmp_path: Path, format: int) -> None:
    long = "klass/" + "n" * (150 if format != tarfile.USTAR_FORMAT else 80)
    first, second = picture(1, "jpg"), picture(2)
    members = [
        ("__index__", b"not a sample"),
        (f"{long}.JPEG", first),
        (f"{long}.json", b"{}"),
        (f"{long}.cls", b" 12\n"),
        ("zwei-ü.cls", b"3"),
        ("zwei-ü.seg.png", b"a mask"),
        ("zwei-ü.txt", b"two"),
        ("zwei-ü.PNG", second),
        ("empty.jpg", b""),
        ("empty.cls", b"4"),
    ]
    shard = make_tar(tmp_path / "other.tar", members, format)
    content = shard.read_bytes()
    found, left_out = scan_tar(shard)
    assert [(sample.key, sample.label) for sample in found] == [(long, 12), ("zwei-ü", 3), ("empty", 4)]
    assert [content[sample.offset :][: sample.length] for sample in found] == [first, second, b""]
    assert left_out == {".seg.png": 1, ".txt": 1, "without extension": 1}


def test_labels_are_read_from_json(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"x"),
        ("a.json", b'{"label": 7, "fine": "12", "name": "n01443537"}'),
        ("b.json", b'{"label": 8, "fine": 13, "name": "n01440764"}'),
        ("b.jpg", b"x"),
        ("about.json", b'{"made": "yesterday"}'),
    ]
    shard = make_tar(tmp_path / "json.tar", members)
    assert labels(shard) == {"a": 7, "b": 8}
    assert labels(shard, LabelRule("fine")) == {"a": 12, "b": 13}
    assert labels(shard, LabelRule("name", SYNSETS)) == {"a": 1, "b": 0}


def test_a_label_of_its_own_comes_before_json_unless_a_field_is_named(tmp_path: Path) -> None:
    members = [("a.jpg", b"x"), ("a.cls", b"5"), ("a.json", b'{"label": 7}'), ("b.jpg", b"x"), ("b.json", b'{"label": 8}')]
    shard = make_tar(tmp_path / "both.tar", members)
    assert labels(shard) == {"a": 5, "b": 8}
    assert labels(shard, LabelRule("label")) == {"a": 7, "b": 8}


def test_labels_are_read_from_class_folders(tmp_path: Path) -> None:
    names = ["n01443537/xyz.JPEG", "train/n01440764/abc.v2.jpeg", "n01440764/d.png"]
    shard = make_tar(tmp_path / "nested.tar", [(name, b"x") for name in names])
    expected = {"n01443537/xyz": 1, "train/n01440764/abc.v2": 0, "n01440764/d": 0}
    assert labels(shard, LabelRule(None, SYNSETS)) == expected
    shard = make_tar(tmp_path / "more.tar", [(name, b"x") for name in (*names, "n01440764/d.cls", "n01440764/d.seg.png")])
    found, left_out = scan_tar(shard, LabelRule(None, SYNSETS))
    assert {sample.key: sample.label for sample in found} == expected
    assert left_out == {".cls": 1, ".seg.png": 1}


@pytest.mark.parametrize(
    ("members", "rule", "message"),
    [
        ([("a.png", b"x")], None, r"'a' has no label \(.cls, or a field 'label' in .json\)"),
        ([("a.png", b"x"), ("a.json", b'{"cls": 1}')], None, "'a' has no label"),
        ([("a.png", b"x"), ("a.json", b"[1]")], None, "'a' has no label"),
        ([("a.png", b"x"), ("a.cls", b"1")], LabelRule("fine"), r"'a' has no label \(a field 'fine' in .json\)"),
        ([("a.cls", b"1")], None, "'a' has no image"),
        ([("a.webp", b"x"), ("a.json", b'{"label": 1}')], None, r"'a' has no image \(jpeg or jpg or png\)"),
        ([("a.webp", b"x"), ("b.tif", b"x")], None, "but 1 .tif, 1 .webp; convert"),
        ([("._a.jpg", b"x"), (".jpg", b"x"), (".cls", b"1")], None, "but 3 hidden; convert"),
        ([], None, "but nothing"),
        (
            [("a.png", b"x"), ("a.cls", b"1"), ("b.v2.png", b"x"), ("b.v2.cls", b"1")],
            None,
            r"'b' has no image \(jpeg or jpg or png\) but '.v2.png', which begins at the first dot; write .* no other dots",
        ),
        ([("a.png", b"x"), ("a.cls", b"1"), ("b.v2.cls", b"1")], None, "'b' has no image .* but '.v2.cls'"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], None, "'a' has two images"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("b.png", b"x"), ("b.cls", b"1"), ("a.png", b"x")], None, "'a' has two images"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.CLS", b"2")], None, "'a' has two .cls members"),
        ([("a.png", b"x"), ("a.cls", b"cat")], None, "'a': .cls holds b'cat', which .* or say with --label-key or"),
        ([("a.png", b"x"), ("a.cls", b"-1")], None, "class number from 0"),
        ([("a.png", b"x"), ("a.cls", b"1" * 30)], None, "class number from 0"),
        ([("a.png", b"x"), ("a.cls", b"\xff\xfe")], None, "class number from 0"),
        ([("a.png", b"x"), ("a.json", b'{"label":')], None, "'a': .json is not JSON"),
        ([("a.png", b"x"), ("a.json", b"[" * 200_000)], None, "'a': .json is not JSON"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], None, "label = 'True', which is no class number"),
        ([("a.png", b"x"), ("a.json", b'{"label": -1}')], None, "label = '-1', which is no class number"),
        ([("a.png", b"x"), ("a.json", b'{"label": "cat"}')], None, "name the classes with --classes"),
        (
            [("a.png", b"x"), ("a.json", b'{"label": "cat"}')],
            LabelRule("label", SYNSETS),
            "'cat', which is no class of --classes, nor the number of one, from 0 to 1; correct one",
        ),
        ([("a.png", b"x"), ("a.json", b'{"label": 2}')], LabelRule("label", SYNSETS), "'2', which is no class of --classes"),
        ([("a.png", b"x")], LabelRule(None, SYNSETS), "lies in the folder ''"),
        ([("n5/a.png", b"x")], LabelRule(None, SYNSETS), "the folder 'n5', which is no class of --classes"),
    ],
)
def test_bad_samples_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], rule: LabelRule | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        scan_tar(make_tar(tmp_path / "bad.tar", members), rule)
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_are_refused_and_folders_are_not(tmp_path: Path) -> None:
    shard = tmp_path / "links.tar"
    with tarfile.open(shard, "w") as tar:
        folder, link = tarfile.TarInfo("klass"), tarfile.TarInfo("klass/a.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "b.jpg"
        tar.addfile(folder)
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'klass/a\.jpg' is a link"):
        scan_tar(shard)


@pytest.mark.parametrize(
    ("name", "mode", "command"),
    [
        ("a.tar.gz", "w:gz", "gunzip '{0}.tar.gz'"),
        ("a.tgz", "w:gz", "gunzip '{0}.tgz'"),
        ("a.tar", "w:gz", "mv '{0}.tar' '{0}.tar.gz' && gunzip '{0}.tar.gz'"),
        ("a.tar.xz", "w:xz", "unxz '{0}.tar.xz'"),
        ("a.tar.bz2", "w:bz2", "bunzip2 '{0}.tar.bz2'"),
    ],
)
def test_compressed_tars_are_refused_with_the_command_that_unpacks_them(
    tmp_path: Path, name: str, mode: str, command: str
) -> None:
    members = [("a.png", b"x"), ("a.cls", b"1")]
    with pytest.raises(DataError, match="is compressed") as caught:
        scan_tar(make_tar(tmp_path / name, members, mode=mode))
    advice = str(caught.value).split("unpack it: ")[1]
    assert advice == command.format(tmp_path / "a")
    if mode == "w:gz":
        subprocess.run(advice, shell=True, check=True)
        assert labels(tmp_path / "a.tar") == {"a": 1}


@pytest.mark.parametrize("name", ["bare.tar", "images.png.gz"])
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, name: str) -> None:
    text = b"no tar\n" * 200
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    with pytest.raises(DataError, match=r"not a readable, uncompressed tar|is compressed"):
        scan_tar(tmp_path / name)


@pytest.mark.parametrize("keep", [2.5, 4.2, 6])
def test_a_truncated_tar_is_refused(tmp_path: Path, keep: float) -> None:
    members = [(f"{i}.{kind}", b"1" + b" " * 599) for i in range(2) for kind in ("png", "cls")]
    shard = make_tar(tmp_path / "cut.tar", members)
    shard.write_bytes(shard.read_bytes()[: int(keep * BLOCK)])
    with pytest.raises(DataError, match=r"cut\.tar"):
        scan_tar(shard)


@pytest.mark.parametrize("damage", [b"\xff", bytes(BLOCK)], ids=["flipped", "zeroed"])
@pytest.mark.parametrize("member", range(10))
def test_a_damaged_header_is_refused_and_loses_nothing_silently(tmp_path: Path, member: int, damage: bytes) -> None:
    """tarfile, and so webdataset, stops there as if the archive ended."""
    (shard,) = write_shards(numbered(5), tmp_path, "train", 10)
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[member].offset
    overwrite(shard, header + (100 if len(damage) == 1 else 0), damage)
    if member > 0:
        with tarfile.open(shard) as tar:
            assert len(tar.getnames()) == member
    with pytest.raises(DataError, match=rf"damaged.* near byte {header}|not a readable"):
        scan_tar(shard)


def test_two_tars_in_one_file_are_refused(tmp_path: Path) -> None:
    first, second = write_shards(numbered(4), tmp_path, "train", 2)
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(DataError, match="data after it"):
        scan_tar(first)


def test_long_padding_is_no_damage(tmp_path: Path) -> None:
    (shard,) = write_shards(numbered(4), tmp_path, "train", 4)
    with open(shard, "ab") as file:
        file.write(bytes(3 << 20))
    assert [sample.label for sample in scan_tar(shard).samples] == [0, 1, 2, 3]
