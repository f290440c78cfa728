"""Loader processes and signals: a scheduler's warning to all processes of a job doesn't end the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svite_scale.data.batches import shared_slots
from svite_scale.errors import DataError
from tests.data.numbered import grey_config, numbers, train_data
from tests.processes import members

PATIENCE_S = 300
PROGRAM = """
import os, signal, sys, time
import torch
from tests.data.numbered import grey_config, numbers, train_data

torch.set_num_threads(1)
warned = []
for warning in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(warning, lambda number, frame: warned.append(number))
stream = train_data(grey_config(train=sys.argv[1], workers=2), 12).batches()
print(len(numbers(next(stream))), flush=True)
while len(warned) < 2:
    time.sleep(0.01)
time.sleep(0.2)
# More than the workers have made in advance.
print(sum(len(numbers(next(stream))) for _ in range(40)), flush=True)
stream.close()
print(sorted(warned), flush=True)
"""


def test_a_warning_to_all_processes_leaves_the_workers_at_work(many: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, many], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "12\n"
        for warning in (signal.SIGTERM, signal.SIGUSR1):
            os.killpg(process.pid, warning)
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert output == f"480\n{sorted([int(signal.SIGTERM), int(signal.SIGUSR1)])}\n"
    assert process.returncode == 0
    assert not members(process.pid)


EARLY = """
import os, signal, sys
from tests.data.numbered import grey_config, numbers, train_data

def warn():
    for warning in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), warning)

os.register_at_fork(after_in_child=warn)
stream = train_data(grey_config(train=sys.argv[1], workers=2), 12).batches()
print(sum(len(numbers(next(stream))) for _ in range(20)), flush=True)
stream.close()
"""


def test_a_warning_at_the_moment_of_the_fork_leaves_the_workers_at_work(many: str) -> None:
    command = [sys.executable, "-c", EARLY, many]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "240\n", "")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes of a group through /proc")
def test_workers_end_with_the_training_process(many: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, many], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "12\n"
    workers = set(members(process.pid)) - {process.pid}
    assert len(workers) == 2
    for worker in workers:
        # Not even one that can't look whether it still has a parent outlives it.
        os.kill(worker, signal.SIGSTOP)
    process.kill()
    process.wait(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while left := members(process.pid):
        if time.monotonic() > deadline:
            for worker in left:
                os.kill(worker, signal.SIGKILL)
            pytest.fail("the workers outlive the training process")
        time.sleep(0.1)
    process.stdout.close()


def test_too_little_memory_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"^1 batches of 1099511627776 images need \d+ bytes of memory, .* lower data"):
        shared_slots(1, (2**40, 3, 224, 224))


CRASH = """
import sys
from tests.data.numbered import grey_config, train_data

stream = train_data(grey_config(train=sys.argv[1], workers=2), 12).batches()
next(stream)
raise KeyError("an error of the trainer's")
"""


def test_a_training_process_that_fails_takes_its_workers_along(many: str) -> None:
    """Python keeps the traceback, and so the stream and its workers, until the process ends."""
    process = subprocess.Popen([sys.executable, "-c", CRASH, many], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert (process.returncode, err.splitlines()[-1]) == (1, 'KeyError: "an error of the trainer\'s"')
    assert not members(process.pid)


@pytest.mark.parametrize("num_hanging", [2, 3])
def test_a_loader_that_hangs_in_fork_is_forked_again(many: str, num_hanging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python before 3.12 this happens if a thread of gloo holds Python's lock of threads at that moment."""
    monkeypatch.setattr("svite_scale.data.workers.PATIENCE_S", (0.2, 0.2, float(PATIENCE_S) if num_hanging == 2 else 0.2))
    monkeypatch.setattr(Forks, "num_hanging", num_hanging)
    stream = train_data(grey_config(train=many, workers=1), 12).batches()
    if num_hanging == 2:
        assert len(numbers(next(stream))) == 12
        stream.close()
    else:
        with pytest.raises(DataError, match=r"loader processes can't be started \(3 were forked, and hung there\)"):
            next(stream)
    assert Forks.num_hanging == 0


class Forks:
    """The next forks of this process, whose first children hang."""

    num_hanging = 0
    is_hanging = False

    @classmethod
    def before(cls) -> None:
        cls.is_hanging = cls.num_hanging > 0
        cls.num_hanging -= cls.is_hanging

    @classmethod
    def after_in_child(cls) -> None:
        if cls.is_hanging:
            time.sleep(PATIENCE_S)


os.register_at_fork(before=Forks.before, after_in_child=Forks.after_in_child)
