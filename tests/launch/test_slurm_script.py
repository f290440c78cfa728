"""The batch script under bash, with stand-ins for Slurm's commands and the launchers; ``tests/slurm`` has the real ones."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
CONFIG = "configs/deit_base_s70.yaml"
GIVEN = ["data.train=/a b/{000..001}.tar", "sparsity.density=0.4"]


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes of 4 GPUs. The launcher's arguments end up in ``called``, one a line; srun ends
    with STATUS, and leaves RANK_STATUS as that of rank 1.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    nodes = 'if [[ $* == "show hostnames gpu[07-08]" ]]; then printf "%s\\n" gpu07 gpu08; exit; fi'
    stand_in(commands, "scontrol", f'{nodes}\necho "$*" >>scontrol; exit "${{REFUSES:-0}}"')
    step = 'printf "%s\\n" "$@" >srun; while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 "$@"'
    ends = '[[ ! ${RANK_STATUS:-} ]] || echo "$RANK_STATUS" >logs/123456/rank-1.status; exit "${STATUS:-0}"'
    stand_in(commands, "srun", f"{step}\n{ends}")
    for launcher in ("torchrun", "deepspeed", "python"):
        stand_in(commands, launcher, 'printf "%s\\n" "${0##*/}" "$@" >called')
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
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=job, capture_output=True, text=True, timeout=60, check=False
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "option", ["nodes", "gpus-per-node", "time", "signal=B:USR1@", "requeue", "open-mode=append", "output"]
)
def test_the_script_asks_slurm_for_each_option(option: str) -> None:
    assert re.search(rf"^#SBATCH --{option}", SCRIPT.read_text(), re.MULTILINE)


def test_options_for_slurm_stand_before_the_first_command() -> None:
    script = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(script) if line and not line.startswith("#"))
    last_option = max(number for number, line in enumerate(script) if line.startswith("#SBATCH"))
    assert last_option < first_command, "sbatch reads no options after the first command"


LAUNCHED = {
    "torchrun": "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-id=123456 --rdzv-endpoint=gpu07:23456",
    "deepspeed": "deepspeed --no_ssh --node_rank 1 --hostfile logs/123456/hostfile --master_addr gpu07 --master_port 23456",
    "srun": "python",
}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_the_training_script_gets_the_config_and_overrides_unchanged(
    tmp_path: Path, job: dict[str, str], launcher: str
) -> None:
    done = run(tmp_path, job, "--launcher", launcher, CONFIG, *GIVEN)
    assert done.returncode == 0, done.stderr
    train = ["launch/train.py", "--config", CONFIG, "--auto-resume", "--log-dir", "logs/123456"]
    assert lines(tmp_path / "called") == [*LAUNCHED[launcher].split(), *train, *GIVEN]
    tasks = 4 if launcher == "srun" else 1
    assert lines(tmp_path / "srun")[:3] == [
        f"--ntasks-per-node={tasks}",
        f"--ntasks={2 * tasks}",
        f"--cpus-per-task={16 // tasks}",
    ]
    assert lines(tmp_path / "logs" / "123456" / "hostfile") == (
        ["gpu07 slots=4", "gpu08 slots=4"] if launcher == "deepspeed" else []
    )


@pytest.mark.parametrize(
    "arguments", [(), ("configs/nothing.yaml",), ("--auto-resume",), ("--launcher",), ("--launcher", "mpirun", CONFIG)]
)
def test_the_script_prints_its_usage_when_the_config_or_launcher_is_wrong(
    tmp_path: Path, job: dict[str, str], arguments: tuple[str, ...]
) -> None:
    done = run(tmp_path, job, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch train.sbatch [--launcher")
    assert not (tmp_path / "srun").exists()


def test_a_failed_step_fails_the_job_which_is_not_requeued(tmp_path: Path, job: dict[str, str]) -> None:
    done = run(tmp_path, {**job, "STATUS": "7", "RANK_STATUS": "1"}, CONFIG)
    assert done.returncode == 7
    assert lines(tmp_path / "scontrol") == []


def test_a_job_is_requeued_when_one_rank_has_saved_whatever_the_launcher_says(tmp_path: Path, job: dict[str, str]) -> None:
    done = run(tmp_path, {**job, "STATUS": "1", "RANK_STATUS": "85"}, CONFIG)
    assert done.returncode == 85
    assert lines(tmp_path / "scontrol") == ["requeue 123456"]
    # The status files of the last start don't count.
    assert run(tmp_path, job, CONFIG).returncode == 0
    assert lines(tmp_path / "scontrol") == ["requeue 123456"]


def test_the_script_says_what_to_do_when_slurm_refuses_to_requeue(tmp_path: Path, job: dict[str, str]) -> None:
    done = run(tmp_path, {**job, "STATUS": "1", "RANK_STATUS": "85", "REFUSES": "1"}, CONFIG)
    assert done.returncode == 85
    assert "can't be requeued; submit it again to resume" in done.stderr
