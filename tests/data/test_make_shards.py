"""The command line: its shards can be trained on; it skips finished work, and names every bad shard."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import webdataset

from svite_scale.data.format.index import sidecar_path
from svite_scale.data.format.patterns import largest_label, load_indexes
from svite_scale.data.loader import EvalData, TrainData
from svite_scale.data.make.shards import write_shards
from svite_scale.data.options import AugmentConfig, DataConfig
from tests.data.numbered import numbered, picture
from tests.data.tars import make_tar, overwrite

pytestmark = pytest.mark.slow


def test_digits_from_the_command_line_train_and_evaluate(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", "mnist5k", "--out", str(tmp_path), "--samples-per-shard", "1500"]
    assert command.main(arguments) == 0
    output, progress = capsys.readouterr()
    assert [line.partition(" (")[0] for line in progress.splitlines()] == [
        "train: 4,000 of 4,000 images",
        "val: 1,000 of 1,000 images",
    ]
    train, val = f"{tmp_path}/train-{{000000..000002}}.tar", f"{tmp_path}/val-{{000000..000000}}.tar"
    assert f"data.train='{train}'\n" in output
    assert f"data.val='{val}'\n" in output
    assert [index.count for index in load_indexes(train)] == [1500, 1500, 1000]
    config = DataConfig(train=train, val=val, workers=0, mean=(0.13,), std=(0.31,), augment=AugmentConfig(recipe="affine"))
    data = TrainData(config, image_shape=(1, 28, 28), global_batch_size=64, seed=0)
    assert (data.num_samples, largest_label(data.indexes)[0]) == (4000, 9)
    assert next(data.batches(5)).images.shape == (64, 1, 28, 28)
    assert EvalData(config, image_shape=(1, 28, 28), batch_size=64).num_samples == 1000

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.count("already complete: ") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_unfinished_output_is_completed_by_the_same_command(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--source",
        "photographs",
        "--count",
        "5",
        "--samples-per-shard",
        "2",
        "--prefix",
        "val",
        "--out",
        str(tmp_path),
    ]
    assert command.main(arguments) == 0
    complete = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(complete) == {"_info.json"} | {f"val-00000{n}.tar{suffix}" for n in range(3) for suffix in ("", ".index.json")}
    (tmp_path / "val-000001.tar").unlink()
    kept = (tmp_path / "val-000002.tar").stat()
    capsys.readouterr()
    assert command.main(arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith("wrote 1 of 3 shards: 5 images in ")
    assert f"data.val='{tmp_path}/val-{{000000..000002}}.tar'" in output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == complete
    assert (tmp_path / "val-000002.tar").stat() == kept


def test_a_folder_of_images_is_written(command: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(picture(number))
    out = tmp_path / "out"
    assert command.main(["--source", str(tmp_path / "images"), "--out", str(out), "--samples-per-shard", "4"]) == 0
    shards = [str(out / f"train-00000{number}.tar") for number in range(2)]
    labels = [int(sample["cls"]) for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]


def test_files_that_are_no_samples_are_counted(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (
        "ant/a.png",
        "ant/b.webp",
        "ant/deep/c.v2.WEBP",
        "ant/d.bmp",
        "bee/e.png",
        "bee/notes",
        "bee/.DS_Store",
        "f.jpg",
    ):
        path = tmp_path / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    assert command.main(["--source", f"{tmp_path}/images", "--out", f"{tmp_path}/out"]) == 0
    out = capsys.readouterr().out
    assert ": 2 images in " in out
    assert "train-000000.tar; left out: 2 .webp, 1 .bmp, 1 .jpg, 1 hidden, 1 without extension\n" in out

    members = [f"{folder}/{file}" for folder in "ab" for file in ("1.jpg", "2.webp", "1.seg.png", "1.\udce9\n")]
    shards = [make_tar(tmp_path / name, [(member, b"x") for member in members]) for name in ("a.tar", "b.tar")]
    make_tar(tmp_path / "c.tar", [("a/1.jpg", b"x"), ("a/1.jpg", b"x")])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert command.main(["--index", str(tmp_path), "--classes", f"{tmp_path}/classes.txt", "--workers", "2"]) == 2
    summary = r"2 indexes are written: 4 samples; left out: 4 .seg.png, 4 .webp, 4 .\udce9\n"
    assert capsys.readouterr().out.splitlines()[0] == summary
    assert [load_indexes(str(shard))[0].count for shard in shards] == [2, 2]


def test_a_flat_folder_is_written_with_a_list_of_labels(command: ModuleType, tmp_path: Path) -> None:
    for folder in ("train/wolf", "train/ant", "val"):
        (tmp_path / folder).mkdir(parents=True)
    for number, file in enumerate(["train/wolf/a.png", "train/ant/b.png", "val/x y.png", "val/z.PNG", "val/other.png"]):
        (tmp_path / file).write_bytes(picture(number))
    (tmp_path / "classes.txt").write_text("wolf\nant\n")
    (tmp_path / "val.txt").write_text("x y.png ant\nz.PNG\twolf\n")
    shared = ["--classes", f"{tmp_path}/classes.txt", "--out", f"{tmp_path}/out"]
    assert command.main(["--source", f"{tmp_path}/train", *shared]) == 0
    assert command.main(["--source", f"{tmp_path}/val", "--labels", f"{tmp_path}/val.txt", "--prefix", "val", *shared]) == 0
    found = {}
    for split in ("train", "val"):
        for sample in webdataset.WebDataset(f"{tmp_path}/out/{split}-000000.tar", shardshuffle=False):
            found[sample["__key__"].partition("-")[2]] = (sample["png"], int(sample["cls"]))
    assert found == {"a": (picture(0), 0), "b": (picture(1), 1), "x-y": (picture(2), 1), "z": (picture(3), 0)}


def test_splits_with_different_classes_are_refused(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("train/ant/a.png", "train/bee/a.png", "val/bee/a.png"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(picture(1))
    out = ["--out", f"{tmp_path}/out", "--prefix"]
    assert command.main(["--source", f"{tmp_path}/train", *out, "train"]) == 0
    assert command.main(["--source", f"{tmp_path}/val", *out, "val"]) == 2
    assert "holds train with 2 classes, and val has 1" in capsys.readouterr().err
    assert command.main(["--source", f"{tmp_path}/train", *out, "val"]) == 0


def test_missing_and_stale_indexes_are_written(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, stale, other, fine = write_shards(numbered(8), tmp_path, "train", 2)
    expected = {shard: sidecar_path(shard).read_bytes() for shard in (missing, other, fine)}
    sidecar_path(missing).unlink()
    stale.write_bytes(stale.read_bytes() + bytes(512))
    sidecar_path(other).write_text('{"format": 1}')
    before = sidecar_path(fine).stat().st_mtime_ns
    assert command.main(["--index", f"{tmp_path}/*.tar", "--workers", "2"]) == 0
    assert capsys.readouterr().out == "3 indexes are written: 6 samples\n"
    assert [index.count for index in load_indexes(str(tmp_path))] == [2] * 4
    assert {shard: sidecar_path(shard).read_bytes() for shard in expected} == expected
    assert sidecar_path(fine).stat().st_mtime_ns == before
    assert command.main(["--index", f"{tmp_path}/*.tar"]) == 0
    assert capsys.readouterr().out == "every shard has its index already\n"


def test_shards_of_others_are_indexed_in_place(command: ModuleType, tmp_path: Path) -> None:
    shard = make_tar(
        tmp_path / "a.tar",
        [(f"n0{i}/{i}.JPEG", picture(i, "jpg")) for i in (1, 2)] + [("n01/1.json", b'{"c": 8}'), ("n02/2.json", b'{"c": 9}')],
    )
    content = shard.read_bytes()
    (tmp_path / "classes.txt").write_text("n02\nn01\n")
    for options, expected in ((["--classes", f"{tmp_path}/classes.txt"], [1, 0]), (["--label-key", "c"], [8, 9])):
        assert command.main(["--index", str(shard), *options]) == 0
        (index,) = load_indexes(str(shard))
        assert index.labels.tolist() == expected
        assert [content[o : o + n] for o, n in zip(index.offsets, index.lengths, strict=True)] == [
            picture(i, "jpg") for i in (1, 2)
        ]
    assert shard.read_bytes() == content


def test_other_shards_are_indexed_when_one_is_bad(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = make_tar(tmp_path / "a.tar", [("caf\udce9.jpg", b"x"), ("caf\udce9.cls", b"1")])
    make_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.json", b"[" * 200_000)])
    (fine,) = write_shards(numbered(2), tmp_path, "train", 2)
    sidecar_path(fine).unlink()
    assert command.main(["--index", str(tmp_path), "--workers", "1"]) == 2
    output = capsys.readouterr()
    assert "b.tar: sample 'a': .json is not JSON" in output.out
    assert "error: 1 of 3 shards can't be indexed; see above" in output.err.splitlines()
    assert [index.count for index in load_indexes(f"{tmp_path}/{{{latin.name},{fine.name}}}")] == [1, 2]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_bad_shard_is_named(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    shards = write_shards(numbered(10), tmp_path, "train", 2)
    assert command.main(["--verify", str(tmp_path), "--workers", workers]) == 0
    output = capsys.readouterr()
    assert output.out == "5 shards are as they were when they were indexed\n"
    assert output.err.startswith("verify: 5 of 5 shards (100%), ")
    overwrite(shards[1], 3 * 512 + 20, b"!")  # in the first image
    os.truncate(shards[3], 1000)
    sidecar_path(shards[4]).unlink()
    assert command.main(["--verify", str(tmp_path), "--workers", workers]) == 2
    output = capsys.readouterr()
    assert f"delete train-000001.tar.index.json and run: python launch/make_shards.py --index '{shards[1]}'" in output.out
    for text, is_there in {"000000": 0, "000001.tar is damaged": 1, "000002": 0, "000003.tar has 1000": 1}.items():
        assert (f"train-{text}" in output.out) == is_there
    assert "train-000004.tar has no index" in output.out
    assert "error: 3 of 5 shards can't be used as they are; see above" in output.err.splitlines()
    assert command.main(["--index", str(tmp_path), "--workers", workers]) == 2
    output = capsys.readouterr()
    assert "000003.tar is not a readable" in output.out or "000003.tar is damaged or cut off" in output.out
    assert "error: 1 of 3 shards can't be indexed; see above" in output.err.splitlines()
    assert "1 of them had an index of the same size but another content, train-000001.tar the first" in output.out.splitlines()
    assert load_indexes(str(shards[4]))[0].count == 2
    assert command.main(["--verify", str(shards[1])]) == 0
