"""``--auto-resume`` starts or resumes a run, and ``--log-dir`` keeps the output of each rank."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from svite_scale.train.run import has_saved
from tests.command_line import Answer, run_command, run_here
from tests.ranks import free_port
from tests.runs import losses_of, metrics_of
from tests.tiny import write_config_file

NUM_STEPS = 16
SINGLE = ("parallel.backend=single", "train.eval_every_epochs=4")


def test_auto_resume_starts_without_a_checkpoint_and_resumes_with_one(
    capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path
) -> None:
    config = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    arguments = ("--config", str(config), "--auto-resume", *SINGLE, "tracking.mlflow=true", "tracking.publish=false")
    # What a kill before the first checkpoint leaves.
    (tmp_path / "run" / "checkpoints" / "step-00000002.partial").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    assert run_here(capsys, *arguments, "train.max_steps=5").status == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    mlflow_run = (tmp_path / "run" / "mlflow_run_id").read_text()

    assert run_here(capsys, *arguments).status == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / "run" / "mlflow_run_id").read_text() == mlflow_run

    straight = ("--config", str(config), *SINGLE, f"run_dir={tmp_path / 'straight'}")
    assert run_here(capsys, *straight).status == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")


def test_auto_resume_refuses_a_run_whose_checkpoints_are_corrupt(
    capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path
) -> None:
    config = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 4, "loss": 2.0}\n')
    answer = run_here(capsys, "--config", str(config), "--auto-resume", *SINGLE)
    assert answer.status == 1
    assert (
        f"{tmp_path / 'run' / 'checkpoints'} holds no checkpoint that is valid; restore one, or start a new run" in answer.err
    )
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [4]


def test_auto_resume_refuses_a_run_whose_checkpoints_are_gone(
    capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path
) -> None:
    config = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    assert run_here(capsys, "--config", str(config), *SINGLE, "train.max_steps=5", "checkpoint.background=false").status == 0
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    answer = run_here(capsys, "--config", str(config), "--auto-resume", *SINGLE)
    assert answer.status == 1
    assert f"{tmp_path / 'run' / 'checkpoints'} holds no checkpoint to resume from; restore one" in answer.err
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_metrics_of_arbitrary_bytes_show_no_save(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\x00\x80{"step": 4')
    assert not has_saved(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"step": 4, "checkpoint_seconds": 0.1}\n\x80')
    assert has_saved(tmp_path)


def test_resume_and_auto_resume_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, "--config", "configs/quickstart.yaml", "--resume", "--auto-resume")
    assert answer.status == 2
    assert "not allowed with argument" in answer.err


def test_each_rank_appends_to_its_log_and_leaves_its_status(digits: Path, tmp_path: Path) -> None:
    config = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    logs = tmp_path / "logs" / "7"
    launcher = ("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()))
    command = (*launcher, "launch/train.py", "--config", str(config), "--log-dir", str(logs), "parallel.backend=ddp")
    answer = run_command(*command, "train.max_steps=2")
    assert answer.status == 0, answer.err
    assert "2 steps, test accuracy" not in answer.out + answer.err
    assert "2 steps, test accuracy" in (logs / "rank-0.log").read_text()
    assert "2 steps, test accuracy" not in (logs / "rank-1.log").read_text()
    assert [(logs / f"rank-{rank}.status").read_text() for rank in range(2)] == ["0\n", "0\n"]

    # Without the launcher, which would end the second rank as soon as the first has gone.
    for rank in range(2):
        names = (f"RANK={rank}", f"LOCAL_RANK={rank}", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1")
        assert run_command("env", *names, "python", *command[len(launcher) :]).status == 2
    log = (logs / "rank-0.log").read_text()
    assert log.index("2 steps, test accuracy") < log.index("config error: run_dir")
    assert [(logs / f"rank-{rank}.status").read_text() for rank in range(2)] == ["2\n", "2\n"]


def test_log_dir_is_named_when_it_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = run_here(capsys, "--config", "configs/quickstart.yaml", "--log-dir", str(tmp_path / "file" / "logs"))
    assert answer.status == 2
    assert answer.err.startswith(f"config error: --log-dir {tmp_path}/file/logs: ")
    assert len(answer.err.splitlines()) == 1


def run_in_log(folder: Path, definition: str, name: str) -> Answer:
    """What a process does whose command is the function ``name`` of a Python text."""
    program = (
        "import argparse, os, resource, signal, sys\n"
        "from svite_scale.runtime.rank_log import run_logged\n"
        f"{definition}\n"
        f"sys.exit(run_logged({name}, argparse.Namespace(log_dir={str(folder)!r})))\n"
    )
    return run_command("python", "-c", program)


def test_killed_rank_leaves_no_status(tmp_path: Path) -> None:
    (tmp_path / "rank-0.status").write_text("0\n")
    answer = run_in_log(tmp_path, "def die(arguments): os.kill(os.getpid(), signal.SIGKILL)", "die")
    assert answer.status == -signal.SIGKILL
    assert not (tmp_path / "rank-0.status").exists()


def test_uncaught_error_is_in_the_log(tmp_path: Path) -> None:
    answer = run_in_log(tmp_path, "def fail(arguments): raise KeyError('no such thing')", "fail")
    assert (answer.status, answer.out, answer.err) == (1, "", "")
    assert "KeyError: 'no such thing'" in (tmp_path / "rank-0.log").read_text()
    assert (tmp_path / "rank-0.status").read_text() == "1\n"


TALK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
def talk(arguments):
    for number in range(50):
        print('line', number)
        print('line', number, '\\udce9', file=sys.stderr)
    return 85
"""


def test_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    answer = run_in_log(tmp_path, TALK, "talk")
    assert (answer.status, answer.out, answer.err) == (85, "", "")
    assert (tmp_path / "rank-0.log").read_text().startswith("line 0\nline 0 \\udce9\nline 1\n")
    assert (tmp_path / "rank-0.status").read_text() == "85\n"
