"""What the Makefile runs and when, with stand-ins for Python and the commands of .venv that write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INSTALL = "python -m pip install -c constraints.txt -e .[{}]"
SHARDS = "python launch/make_shards.py --source mnist5k --out data/mnist5k"
TEST = "python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0"
TRAIN = "deepspeed --num_gpus {} launch/train.py --config configs/quickstart.yaml run_dir={}"
EVALUATE = "python launch/evaluate.py --run {}"
REPORT = "python launch/report.py --run {}"

# Serves as python3, as .venv's python and as its deepspeed, ruff and mypy.
STAND_IN = """#!/usr/bin/env bash
name=$(basename "$0")
if [[ $1 == -c ]]; then echo "${GPUS:-2}"; exit; fi
if [[ $1 == -m && $2 == venv ]]; then
    mkdir -p "$3/bin"
    for command in python deepspeed ruff mypy; do cp "$0" "$3/bin/$command"; done
    name=base
fi
echo "$name $*" >>calls
[[ $1 == launch/make_shards.py ]] && mkdir -p data/mnist5k
[[ -z ${FAIL:-} || "$*" != *"$FAIL"* ]]
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "stand_in").write_text(STAND_IN)
    (tmp_path / "stand_in").chmod(0o755)
    return tmp_path


def run_of(run_dir: str, ranks: int = 2) -> list[str]:
    """Returns the calls that train the quick start, and show its result."""
    return [TRAIN.format(ranks, run_dir), EVALUATE.format(run_dir), REPORT.format(run_dir)]


def make(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Nothing of a make that runs these tests, nor of the user's choices, may reach the inner one.
    inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        ["make", f"PYTHON={clone}/stand_in", *arguments],
        cwd=clone,
        env={"CXX": "true", **inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def calls(clone: Path) -> list[str]:
    """What was called since the last look."""
    log = clone / "calls"
    lines = [line.rstrip() for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_quickstart_sets_up_makes_shards_and_trains(clone: Path) -> None:
    assert make(clone, "quickstart").returncode == 0
    assert calls(clone) == ["base -m venv .venv", INSTALL.format("quickstart"), SHARDS, *run_of("runs/quickstart")]


def test_second_quickstart_trains_beside_the_first_run_and_sets_up_nothing(clone: Path) -> None:
    make(clone, "quickstart")
    calls(clone)
    (clone / "runs" / "quickstart").mkdir(parents=True)
    (clone / "runs" / "quickstart-2").mkdir()
    assert make(clone, "quickstart").returncode == 0
    assert calls(clone) == run_of("runs/quickstart-3")


def test_quickstart_takes_ranks_from_the_machine_unless_given(clone: Path) -> None:
    make(clone, "quickstart", GPUS="1")
    assert calls(clone)[-3:] == run_of("runs/quickstart", ranks=1)
    make(clone, "quickstart", "RANKS=4", "RUN_DIR=runs/mine")
    assert calls(clone)[-3:] == run_of("runs/mine", ranks=4)


@pytest.mark.parametrize("step", ["-m venv", "-m pip", "launch/make_shards.py"])
def test_quickstart_repairs_what_failed_midway_when_run_again(clone: Path, step: str) -> None:
    assert make(clone, "quickstart", FAIL=step).returncode != 0
    assert step in calls(clone)[-1]
    assert make(clone, "quickstart").returncode == 0
    again = calls(clone)
    assert step in again[0]
    assert again[-3:] == run_of("runs/quickstart")


def test_test_fast_leaves_slow_tests_out_and_needs_no_compiler(clone: Path) -> None:
    assert make(clone, "test-fast", "PYTEST_ARGS=-k config", CXX="no-such-compiler").returncode == 0
    assert calls(clone) == ["base -m venv .venv", INSTALL.format("test"), f"{TEST} -m not slow -k config"]


def test_test_and_lint_install_their_own_extras_once(clone: Path) -> None:
    assert make(clone, "test", "PYTEST_ARGS=-k config").returncode == 0
    assert calls(clone) == ["base -m venv .venv", INSTALL.format("test"), f"{TEST} -k config"]
    assert make(clone, "lint").returncode == 0
    assert calls(clone) == [INSTALL.format("dev"), "ruff check .", "ruff format --check .", "mypy"]
    assert make(clone, "test", "lint").returncode == 0
    assert calls(clone) == [TEST, "ruff check .", "ruff format --check .", "mypy"]


def test_test_installs_again_when_dependencies_change(clone: Path) -> None:
    make(clone, "test")
    calls(clone)
    later = (clone / ".venv" / ".installed-test").stat().st_mtime + 10
    os.utime(clone / "constraints.txt", (later, later))
    make(clone, "test")
    assert calls(clone) == [INSTALL.format("test"), TEST]


@pytest.mark.parametrize("goal", ["quickstart", "test"])
def test_goal_reports_a_missing_compiler_before_anything_else(clone: Path, goal: str) -> None:
    done = make(clone, goal, CXX="no-such-compiler")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("No C++ compiler: ")
    assert calls(clone) == []


def test_goal_fails_when_its_command_fails(clone: Path) -> None:
    assert make(clone, "test", FAIL="-m pytest").returncode != 0
    assert make(clone, "lint", FAIL="format").returncode != 0


def test_ci_script_runs_lint_and_tests_and_the_workflow_runs_it() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make lint", "make test"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {job["steps"][-1]["run"] for job in workflow["jobs"].values()} == {"make lint test-fast", ".ci/run"}
