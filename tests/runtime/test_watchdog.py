"""A rank that dies, stops or hangs ends the job, and is named."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.jobs import Fault, Job, eventually

TIMEOUT_S = 6
OVERRIDES = ("parallel.backend=ddp", "train.global_batch_size=15", f"guard.hang_timeout_s={TIMEOUT_S}")


FAULTS = {
    "killed": (Fault(1, 4, "SIGKILL"), "no sign of life"),
    "stopped": (Fault(2, 4, "SIGSTOP"), "no sign of life"),
    "hanging": (Fault(1, 4, "sleep"), "no progress"),
    "hanging main rank": (Fault(0, 4, "sleep"), "no progress"),
    # Its beats and the store that it keeps end together; which of them is missed first is a matter of chance.
    "killed main rank": (Fault(0, 4, "SIGKILL"), "it was killed or stopped"),
    "stopped main rank": (Fault(0, 4, "SIGSTOP"), "it was killed or stopped"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_job_ends_and_names_the_rank_that_dies_or_hangs(config_path: Path, name: str) -> None:
    fault, cause = FAULTS[name]
    ended = Job(3, config_path, *OVERRIDES, fault=fault).wait()
    # A rank whose threads still run ends itself; one that is stopped is killed.
    itself = 1 if fault.kind == "sleep" else -signal.SIGKILL
    assert [one.status for one in ended] == [itself if rank == fault.rank else 1 for rank in range(3)], ended
    lines = [line for one in ended for line in one.err.splitlines() if line.startswith("error: ")]
    (line,) = lines
    found = re.fullmatch(r"error: rank (\d) on \S+ \((.*?)\): (.*); rank \d on \S+ \((.*?)\) ends the job", line)
    assert found, line
    assert int(found[1]) == fault.rank
    assert cause in found[3]
    # A rank that hangs still beats. The last beat of a gone rank may be older, but this rank's step shows the same.
    assert found[2 if fault.kind == "sleep" else 4].startswith("after step 3, ")
    if fault.kind == "sleep":
        assert found[2].endswith(", data")


def test_job_ends_when_one_rank_raises(config_path: Path) -> None:
    ended = Job(3, config_path, *OVERRIDES, fault=Fault(1, 4, "raise")).wait()
    assert [one.status for one in ended] == [1, 1, 1]
    assert re.search(r"^error: rank 1 on \S+ \(after step 3, data\) failed: SystemExit: a mistake", ended[1].err, re.M)
    assert "Traceback" in ended[1].err
    assert "error" not in ended[0].err + ended[2].err, "one rank speaks"


def test_job_resumes_when_it_was_suspended_as_a_whole(config_path: Path) -> None:
    job = Job(2, config_path, "parallel.backend=ddp", "guard.hang_timeout_s=4", fault=Fault(0, 4, "SIGSTOP"))
    eventually(lambda: job.is_stopped(0))
    pids = [process.pid or 0 for process in job.processes]
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(6)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert [one.status for one in job.wait()] == [0, 0]


def test_job_without_a_timeout_has_no_watchdog(config_path: Path) -> None:
    job = Job(2, config_path, "parallel.backend=ddp", "guard.hang_timeout_s=null", fault=Fault(0, 4, "SIGKILL"))
    (ended,) = job.wait(1)
    # gloo's own error; under NCCL there would be none for half an hour.
    assert ended.status == 1
    assert "RuntimeError" in ended.err
    assert "rank 0" not in ended.err
