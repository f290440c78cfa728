"""The command line: what it writes trains; it skips finished work; mistakes end with status 2 and one line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import webdataset

from svite_scale.config import AugmentConfig, DataConfig
from svite_scale.data import EvalData, TrainData, load_indexes
from svite_scale.data.index import sidecar_path
from tests.data.numbered import picture

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "make_shards.py"


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = spec_from_file_location("make_shards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_from_the_command_line_train_and_evaluate(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", "mnist5k", "--out", str(tmp_path), "--samples-per-shard", "1500"]
    assert command.main(arguments) == 0
    output = capsys.readouterr().out
    train, val = f"{tmp_path}/train-*.tar", f"{tmp_path}/val-*.tar"
    assert f"data.train={train}\n" in output
    assert f"data.val={val}\n" in output
    assert [index.count for index in load_indexes(train)] == [1500, 1500, 1000]
    config = DataConfig(train=train, val=val, workers=0, mean=(0.13,), std=(0.31,), augment=AugmentConfig(recipe="affine"))
    data = TrainData(
        config, image_size=28, in_channels=1, global_batch_size=64, accumulation_steps=1, rank=0, world_size=1, seed=0
    )
    assert (data.num_samples, data.num_classes) == (4000, 10)
    assert next(data.batches(5)).images.shape == (64, 1, 28, 28)
    assert EvalData(config, image_size=28, in_channels=1, batch_size=64, rank=0, world_size=1).num_samples == 1000

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.count("already complete: ") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_unfinished_output_is_finished(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--source",
        "photographs",
        "--count",
        "4",
        "--samples-per-shard",
        "2",
        "--out",
        str(tmp_path),
        "--prefix",
        "val",
    ]
    assert command.main(arguments) == 0
    complete = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(complete) == {f"val-00000{n}.tar{suffix}" for n in range(2) for suffix in ("", ".index.json")}
    (tmp_path / "val-000001.tar").unlink()
    assert command.main(arguments) == 0
    output = capsys.readouterr().out
    assert "already" not in output
    assert f"data.val={tmp_path}/val-*.tar" in output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == complete


def test_a_folder_of_images(command: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(picture(number))
    out = tmp_path / "out"
    assert command.main(["--source", str(tmp_path / "images"), "--out", str(out), "--samples-per-shard", "4"]) == 0
    shards = [str(out / f"train-00000{number}.tar") for number in range(2)]
    labels = [int(sample["cls"]) for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]


def test_indexing(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--source", "photographs", "--count", "2", "--out", str(tmp_path)]) == 0
    (index,) = load_indexes(str(tmp_path))
    sidecar_path(index.path).unlink()
    capsys.readouterr()
    assert command.main(["--index", f"{tmp_path}/*.tar"]) == 0
    assert capsys.readouterr().out == f"wrote {sidecar_path(index.path)}\n"
    assert command.main(["--index", f"{tmp_path}/*.tar"]) == 0
    assert capsys.readouterr().out == "every shard has its index already\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "nowhere"], "--index = 'nowhere': no shard matches"),
        (["--source", "nowhere", "--out", "{}"], "nowhere is not a folder"),
        (["--source", "photographs", "--count", "0", "--out", "{}"], "no samples"),
        (["--source", "photographs", "--samples-per-shard", "0", "--out", "{}"], "samples_per_shard is 0"),
        (["--source", "photographs", "--count", "1", "--out", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_mistakes_in_one_line(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main([argument.format(tmp_path) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--source", "mnist5k"],
        ["--source", "mnist5k", "--index", "x"],
        ["--sour", "mnist5k", "--out", "x"],
        ["--source", "mnist5k", "--out", "x", "--prefix", "train"],
        ["--source", "mnist5k", "--out", "x", "--count", "5"],
        ["--index", "x", "--prefix", "train"],
    ],
)
def test_usage(command: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--index", "nowhere"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --index = 'nowhere'")
    assert done.stderr.count("\n") == 1
