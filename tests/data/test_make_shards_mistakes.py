"""Mistakes in the command that makes shards: status 2 and one line with a remedy."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.conftest import ROOT, SCRIPT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "nowhere"], "--index = 'nowhere': no shard matches"),
        (["--verify", "nowhere"], "--verify = 'nowhere': no shard matches"),
        (["--index", "nowhere", "--workers", "0"], "--workers is 0"),
        (["--source", "nowhere", "--out", "{}"], "nowhere is not a folder"),
        (["--source", "{}", "--out", "{}", "--classes", "{}/none.txt"], "none.txt can't be read"),
        (["--source", "{}", "--out", "{}", "--labels", "{}/none.txt"], "none.txt can't be read"),
        (["--source", "photographs", "--count", "-3", "--out", "{}"], "--count is -3; use at least 1"),
        (["--source", "photographs", "--samples-per-shard", "0", "--out", "{}"], "--samples-per-shard is 0; use at"),
        (["--source", "photographs", "--count", "1", "--out", "/dev/null/x"], "--out /dev/null/x can't be written to ("),
        (["--source", "photographs", "--count", "1", "--out", "/dev/null"], "File exists: '/dev/null'); make room or repair"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main([argument.format(tmp_path) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        (["--source", "photographs", "--out", "{}"], "resumes where it stopped"),
        (["--index", "{}"], "resumes where it stopped"),
        (["--index", "{}", "--label-key", "label"], "starts again"),
        (["--verify", "{}"], "starts again"),
    ],
)
def test_an_interrupted_command_says_how_to_resume(
    command: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    again: str,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("find_shards", "write"):
        monkeypatch.setattr(f"svite_scale.data.make.command.{name}", interrupt)
    assert command.main([argument.format(tmp_path) for argument in arguments]) == 130
    assert capsys.readouterr().err == f"interrupted; the same command {again}\n"


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
        ["--index", "x", "--verify", "x"],
        ["--index", "x", "--out", "y"],
        ["--index", "x", "--samples-per-shard", "7"],
        ["--verify", "x", "--out", "y"],
        ["--verify", "x", "--samples-per-shard", "-7"],
        ["--source", "photographs", "--out", "x", "--prefix", ""],
        ["--source", "photographs", "--out", "x", "--prefix", "a/b"],
        ["--source", "photographs", "--out", "x", "--prefix", "a*"],
        ["--source", "photographs", "--out", "x", "--classes", "y"],
        ["--index", "x", "--labels", "y"],
        ["--verify", "x", "--label-key", "y"],
        ["--source", "photographs", "--out", "x", "--fonts", "y"],
        ["--source", "mnist5k", "--out", "x", "--canvas", "42"],
        ["--index", "x", "--image-size", "28"],
        ["--source", "glyphs", "--out", "x", "--prefix", "y"],
        ["--source", "glyphs", "--out", "x", "--classes", "y"],
    ],
)
def test_wrong_usage_is_refused(command: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_reported_in_one_line(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    """A limit on the size of files simulates it."""
    arguments = ["--source", "photographs", "--count", "4", "--samples-per-shard", "1", "--out", str(tmp_path)]
    unbounded = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, unbounded[1]))
    try:
        assert command.main([*arguments, "--workers", workers]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unbounded)
    message = (
        f"error: --out {tmp_path} can't be written to ([Errno 27] File too large); make room or repair it and give the same"
    )
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert command.main(arguments) == 0


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--index", "nowhere"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --index = 'nowhere'")
    assert done.stderr.count("\n") == 1
