"""A run that fails ends: its cause printed, status 1, no process left, whatever was still under way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from svite_scale.data.batches import explain_loader_error
from svite_scale.errors import ConfigError, DataError, DivergedError
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.ending import Failure, reporting
from svite_scale.runtime.signals import Preempted
from svite_scale.runtime.world import World
from tests.command_line import ROOT
from tests.faulty import SMALL_SHM, inject
from tests.jobs import DEADLINE_S, Ended, Job
from tests.processes import members
from tests.runs import ENGINES
from tests.tiny import write_config_file, write_digits

HANG_TIMEOUT_S = 8


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Of this test alone, for it may spoil them."""
    (tmp_path / "shards").mkdir()
    return write_digits(tmp_path / "shards")


@pytest.fixture
def config_path(shards: Path, tmp_path: Path) -> Path:
    return write_config_file(shards, tmp_path / "run", tmp_path / "tiny.yaml")


def overrides(workers: int, engine: str, *more: str) -> tuple[str, ...]:
    """Of a run that doesn't end by itself."""
    steps = ("train.epochs=1000", "train.eval_every_epochs=2", "checkpoint.every_steps=6", "train.log_every=2")
    return (f"data.workers={workers}", *ENGINES[engine], *steps, *more)


MISTAKE = r"error: rank {last} on \S+ \(after step \d+, {phase}\) failed: KeyError: 'a mistake of ours'"
ENDS = {
    ("unreadable", 1, "single"): r"error on rank 0: \S+/train-00000\d\.tar ends before byte \d+, inside a sample; write .*",
    ("killed", 2, "single"): (
        r"error on rank 0: data\.workers: a loader process is gone \(DataLoader worker .*\): probably killed because "
        r"memory ran out; give the job more memory, and more of /dev/shm \(docker run --shm-size\), or lower .*"
    ),
    (
        "memory",
        2,
        "fsdp2",
    ): r"error: rank 1 on \S+ \(after step 3, compute\) failed: OutOfMemoryError: CUDA out of memory\. .*",
    ("writer", 1, "fsdp2"): MISTAKE.format(last=1, phase="checkpoint"),
    ("transform", 1, "zero3"): r"error: rank 1 on \S+ \(after step \d, data\) failed: KeyError: .*",
    ("evaluation", 0, "zero3"): MISTAKE.format(last=1, phase="evaluation"),
    ("saving", 0, "fsdp2"): MISTAKE.format(last=1, phase="checkpoint"),
}
"""The line of each situation, by fault, loader processes and engine."""


@pytest.mark.parametrize(("fault", "workers", "engine"), ENDS)
def test_an_error_ends_all_ranks_and_their_loaders(
    config_path: Path, shards: Path, fault: str, workers: int, engine: str
) -> None:
    world_size = 1 if engine == "single" else 2
    job = Job(world_size, config_path, *overrides(workers, engine), inject=partial(inject, fault, shards))
    ended = job.wait()
    assert [one.status for one in ended] == [1] * world_size, ended
    found = [line for line in re.split(r"[\r\n]", ended[-1].err) if re.fullmatch(ENDS[fault, workers, engine], line)]
    assert len(found) == 1, ended[-1].err
    # A mistake of ours can be mended with a traceback only, one of the user's without.
    assert ("Traceback" in ended[-1].err) == found[0].startswith("error: "), ended[-1].err
    assert_gone(job)


def assert_gone(job: Job) -> None:
    """No process of the ranks is left. What the kernel kills is gone soon, but not at once."""
    deadline = time.monotonic() + DEADLINE_S
    while left := [pid for process in job.processes for pid in members(process.pid or 0)]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.1)


def test_a_full_shm_is_one_line_with_a_remedy(config_path: Path, shards: Path) -> None:
    """The training loader has its processes when it fills up; the first evaluation's can't be started."""
    if os.geteuid() != 0 or subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode:
        pytest.skip("a /dev/shm to fill can't be had here")
    command = [sys.executable, "tests/faulty.py", "--config", str(config_path), *overrides(1, "single")]
    environment = {**os.environ, "FAULT": "shm", "FAULT_SHARDS": str(shards), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*SMALL_SHM, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "error on rank 0: data.workers = 1: loader processes can't be started ([Errno 28] No space left on device); give the "
        "job more memory, and more of /dev/shm (docker run --shm-size), or lower data.workers; 0 starts none"
    )
    assert "Traceback" not in ended.stderr


def ended_hanging(config_path: Path, shards: Path, fault: str, *more: str) -> Ended:
    timeout = f"guard.hang_timeout_s={HANG_TIMEOUT_S}"
    (ended,) = Job(1, config_path, *overrides(1, "single", timeout, *more), inject=partial(inject, fault, shards)).wait()
    assert ended.status == 1
    assert re.search(
        r"^error: rank 0 on \S+ \(after step \d, leaving\): no progress for 6 s; .* ends the job$", ended.err, re.M
    )
    return ended


def test_an_error_is_reported_before_the_way_out_hangs(config_path: Path, shards: Path) -> None:
    err = ended_hanging(config_path, shards, "closing").err
    assert err.index("failed: KeyError: 'a mistake of ours'") < err.index("leaving): no progress")


def test_the_watchdog_ends_a_run_that_is_done_but_does_not_exit(config_path: Path, shards: Path) -> None:
    err = ended_hanging(config_path, shards, "group", "train.max_steps=4").err
    assert (config_path.parent / "run" / "summary.json").exists()
    assert "failed" not in err


def test_another_rank_reports_on_a_new_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The main rank's bar may stand on the line."""
    failure = Failure(explain_loader_error)
    failure.world = World(rank=1, size=2, local_rank=1, local_size=2)
    failure.report(DataError("a shard is gone"))
    assert capsys.readouterr().err == "\nerror on rank 1: a shard is gone\n"


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ConfigError("a.b", 1, "is wrong", "use 2"), "config error: a.b = 1: is wrong; use 2\n", 2),
        (DataError("a shard is gone"), "error on rank 0: a shard is gone\n", 1),
        (DivergedError("too often"), "error: too often\n", 1),
    ],
)
def test_a_mistake_of_the_user_is_reported_in_one_line(
    error: Exception, line: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = Failure(explain_loader_error)
    assert [failure.report(error), failure.report(error)] == [status, status]
    assert capsys.readouterr().err == line, "once"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(0), RuntimeError("a\nb")], ids=repr)
def test_any_other_error_is_reported_with_its_traceback(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    failure, activity = Failure(explain_loader_error), Activity()
    activity.enter("compute")
    with pytest.raises(type(error)), reporting(lambda found: failure.report(found, activity)):
        raise error
    assert failure.report(error) == 1
    err = capsys.readouterr().err
    assert err.count("Traceback (most recent call last)") == 1
    assert re.search(rf"^error: rank 0 on \S+ \(after step 0, compute\) failed: {type(error).__name__}:", err, re.M)


def test_a_preempted_run_is_not_reported_as_failed() -> None:
    with pytest.raises(Preempted), reporting(lambda _: pytest.fail("this is no error")):
        raise Preempted(3)


def test_a_process_ends_when_its_threads_and_exit_handlers_hang() -> None:
    program = (
        "import atexit, sys, threading, time\n"
        "from svite_scale.runtime.ending import run_process\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "atexit.register(time.sleep, 1000)\n"
        "sys.stdout.write('unflushed')\n"
        "run_process(lambda: {}[0] if len(sys.argv) > 1 else 7)\n"
    )
    for arguments, status in (((), 7), (("fails",), 1)):
        command = [sys.executable, "-c", program, *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert (ended.returncode, ended.stdout, "KeyError: 0" in ended.stderr) == (status, "unflushed", bool(arguments))
