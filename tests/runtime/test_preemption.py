"""A signal to any rank stops all after the same step, saved; and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svite_scale.runtime.signals import SAME_SIGNAL_S
from tests.command_line import ROOT
from tests.jobs import DEADLINE_S, Fault, Job, eventually
from tests.runs import losses_of, metrics_of

DDP = "parallel.backend=ddp"


@pytest.mark.parametrize(("kind", "rank", "world_size"), [("SIGTERM", 1, 3), ("SIGUSR1", 0, 1)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(config_path: Path, kind: str, rank: int, world_size: int) -> None:
    run_dir = config_path.parent / "run"
    batch = "train.global_batch_size=15"
    ended = Job(world_size, config_path, DDP, batch, fault=Fault(rank, 6, kind)).wait()
    assert [one.status for one in ended] == [85] * world_size, ended
    # It comes during step 6, and the ranks hear of it by the end of step 7.
    assert ended[0].err.endswith("\nstopped by a signal, saved after step 7; resume with --resume\n")
    assert "Traceback" not in "".join(one.err for one in ended)
    assert (run_dir / "checkpoints" / "step-00000007").is_dir()
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, 8))

    assert [one.status for one in Job(world_size, config_path, DDP, batch, resume=True).wait()] == [0] * world_size
    stopped = losses_of(run_dir)
    straight = config_path.parent / "straight"
    assert [one.status for one in Job(world_size, config_path, DDP, batch, f"run_dir={straight}").wait()] == [0] * world_size
    assert stopped == losses_of(straight), "as if it had never stopped"


def test_a_signal_during_the_last_steps_stops_nothing(config_path: Path) -> None:
    ended = Job(2, config_path, DDP, "train.max_steps=5", fault=Fault(0, 5, "SIGTERM")).wait()
    assert [one.status for one in ended] == [0, 0], ended


def test_a_stopping_run_skips_its_evaluation(config_path: Path) -> None:
    """Each fourth step ends an epoch, and is evaluated as a rule."""
    (ended,) = Job(1, config_path, fault=Fault(0, 7, "SIGTERM")).wait()
    assert ended.err.endswith("saved after step 8; resume with --resume\n")
    assert [line["step"] for line in metrics_of(config_path.parent / "run") if "eval_loss" in line] == [4]


def test_a_second_signal_ends_the_process_at_once(config_path: Path) -> None:
    job = Job(2, config_path, DDP, fault=Fault(0, 3, "sleep"))
    metrics = config_path.parent / "run" / "metrics.jsonl"
    eventually(lambda: metrics.exists() and len(metrics.read_text().splitlines()) == 2)
    # Soon rank 1 waits for rank 0 in a collective, where Python runs no handler.
    time.sleep(1)
    for pause in (0.1, SAME_SIGNAL_S + 1):
        os.kill(job.processes[1].pid or 0, signal.SIGTERM)
        time.sleep(pause)
        assert job.processes[1].is_alive(), "the first only asks, and so does what comes right after it"
    os.kill(job.processes[1].pid or 0, signal.SIGTERM)
    (ended,) = job.wait(1)
    assert ended.status == 128 + signal.SIGTERM


FORK = """
import os, signal
from svite_scale.runtime.signals import StopSignals
with StopSignals() as signals:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM, "a child dies of it"
    os.kill(os.getpid(), signal.SIGCHLD)
    assert not signals.received, "and this process isn't meant"
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""


def test_signals_to_forked_children_and_other_signals_stop_nothing() -> None:
    subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, check=True, timeout=DEADLINE_S)
