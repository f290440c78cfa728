"""The plain batch script, run under bash with stand-ins for Slurm's commands that write down how they were called."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "slurm" / "train.sbatch"
TRAIN_OPTIONS = {"--config", "--resume", "--dry-run"}
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*")
CONFIG = "configs/deit_base_s70.yaml"


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, in whose folder srun's arguments end up in ``called``, one a line."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_in(commands, "scontrol", '[[ "$*" == "show hostnames gpu[07-08]" ]] && printf "%s\\n" gpu07 gpu08')
    stand_in(commands, "srun", 'printf "%s\\n" "$@" >called; env >environment; eval "${STEP:-true}"')
    (tmp_path / "configs").mkdir()
    (tmp_path / CONFIG).write_text("run_dir: a\n")
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "16",
    }


def run(folder: Path, job: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=job, capture_output=True, text=True, timeout=30, check=False
    )


def test_bash_parses_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
    "option", ["nodes", "ntasks-per-node=1", "gpus-per-node", "cpus-per-task", "time", "signal=B:USR1@", "no-requeue", "output"]
)
def test_it_states_what_it_asks_slurm_for(option: str) -> None:
    assert re.search(rf"^#SBATCH --{option}", SCRIPT.read_text(), re.MULTILINE)


def test_the_options_for_slurm_stand_before_the_first_command() -> None:
    lines = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    last_option = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_option < first_command, "sbatch reads no options after the first command"


def test_it_starts_one_torchrun_a_node_that_meet_at_the_first(tmp_path: Path, job: dict[str, str]) -> None:
    done = run(tmp_path, job, CONFIG)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[: called.index("launch/train.py")] == [
        "--kill-on-bad-exit=1",
        "--output=logs/123456/node-%n.log",
        "torchrun",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-id=123456",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=gpu07:23456",
    ]
    assert (tmp_path / "logs" / "123456").is_dir()
    environment = (tmp_path / "environment").read_text().splitlines()
    assert "SRUN_CPUS_PER_TASK=16" in environment
    assert f"job 123456: {CONFIG} on gpu07 gpu08, rendezvous at gpu07:23456" in done.stdout


def test_the_config_and_the_overrides_reach_the_training_script_whole(tmp_path: Path, job: dict[str, str]) -> None:
    given = ["--resume", "data.train=/a b/{000..001}.tar", "sparsity.density=0.4"]
    assert run(tmp_path, job, CONFIG, *given).returncode == 0
    called = (tmp_path / "called").read_text().splitlines()
    passed = called[called.index("launch/train.py") + 1 :]
    assert passed == ["--config", CONFIG, *given]
    assert all(word in TRAIN_OPTIONS or word == CONFIG or OVERRIDE.fullmatch(word) for word in passed)


def test_it_writes_no_option_that_the_training_script_lacks() -> None:
    after = SCRIPT.read_text().partition("    launch/train.py ")[2].splitlines()[0]
    assert set(re.findall(r"--[a-z-]+", after)) <= TRAIN_OPTIONS


@pytest.mark.parametrize("arguments", [(), ("configs/nothing.yaml",), ("--resume",)])
def test_a_missing_config_ends_it_with_usage(tmp_path: Path, job: dict[str, str], arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, job, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch launch/slurm/train.sbatch CONFIG")
    assert not (tmp_path / "called").exists()


def test_the_steps_failure_is_the_jobs(tmp_path: Path, job: dict[str, str]) -> None:
    assert run(tmp_path, {**job, "STEP": "exit 7"}, CONFIG).returncode == 7


@pytest.mark.parametrize("code", [0, 7])
def test_the_signal_before_the_time_limit_is_reported_and_ends_nothing(tmp_path: Path, job: dict[str, str], code: int) -> None:
    step = f"touch started; until [[ -e go ]]; do sleep 0.05; done; exit {code}"
    with subprocess.Popen(
        ["bash", str(SCRIPT), CONFIG], cwd=tmp_path, env={**job, "STEP": step}, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for(tmp_path / "started")
        process.send_signal(signal.SIGUSR1)
        assert process.stdout is not None
        assert "rendezvous" in process.stdout.readline()
        assert "the time limit is near" in process.stdout.readline()
        (tmp_path / "go").touch()
        assert process.wait(timeout=30) == code


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.02)
