"""``configs/accelerate``: what ``accelerate launch`` makes of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.command_line import ROOT, run_command, run_here
from tests.launch.test_launchers import on_cpus
from tests.ranks import free_port
from tests.runs import losses_of
from tests.tiny import write_config_file

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
RANKS = {"two_processes": 2, "eight_gpus": 8, "two_machines": 16}


def accelerate(config: str, *arguments: str) -> tuple[str, ...]:
    port = ("--main_process_port", str(free_port()))
    return ("accelerate", "launch", "--config_file", f"configs/accelerate/{config}.yaml", *port, *arguments)


@on_cpus
def test_two_processes_train_under_ddp(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    train = ("--config", str(config), "train.max_steps=3")
    answer = run_command(*accelerate("two_processes", "launch/train.py", *train), "parallel.backend=ddp")
    assert answer.status == 0, answer.err
    assert '"world_size": 2' in (tmp_path / "run" / "summary.json").read_text()
    alone = run_here(capsys, *train, "parallel.backend=single", f"run_dir={tmp_path / 'alone'}")
    assert alone.status == 0, alone.err
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "alone"), abs=1e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_starts_its_number_of_ranks_on_its_number_of_machines(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert config["num_processes"] == RANKS[path.stem]
    assert config["num_machines"] == (2 if path.stem == "two_machines" else 1)
    # Any other type would set up an engine beside ours, or start one process only.
    assert config["distributed_type"] == "MULTI_GPU"


def test_two_machines_join_one_job(tmp_path: Path) -> None:
    """Two launchers on this machine, of one process each, at the same address."""
    program = tmp_path / "show.py"
    program.write_text("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'])")
    command = accelerate("two_machines", "--num_processes", "2", "--main_process_ip", "127.0.0.1")
    with ThreadPoolExecutor(2) as machines:
        answers = list(machines.map(lambda rank: run_command(*command, "--machine_rank", str(rank), str(program)), range(2)))
    assert [answer.status for answer in answers] == [0, 0], answers[0].err + answers[1].err
    port = command[command.index("--main_process_port") + 1]
    assert [answer.out.split() for answer in answers] == [["0", "2", port], ["1", "2", port]]
