"""The fixture leaves nothing behind, however the process that started it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import PREFIX, Cluster, pids_in, remove_leftovers, remove_namespace

PROGRAM = """
import os, sys
from pathlib import Path
from tests.slurm.cluster import Cluster, pids_in
cluster = Cluster(Path(sys.argv[1]))
print(*[pid for name in cluster.names.values() for pid in pids_in(name)], flush=True)
os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_suite_leaves_nothing_however_it_ends(cluster: Cluster, tmp_path: Path, ended_by: signal.Signals) -> None:
    """``cluster`` stands for another suite at the same time, which must not be touched."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cluster"), str(int(ended_by))]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as suite:
        assert suite.stdout is not None
        pids = [int(word) for word in suite.stdout.readline().split()]
    assert len(pids) >= 3, "the daemons"
    cluster.wait_until(
        lambda: not namespaces_of(suite.pid) and not [*Path("/etc/netns").glob(f"{PREFIX}-{suite.pid}-*")],
        "the namespaces and their files are gone",
    )
    for pid in pids:
        assert not Path("/proc", str(pid)).exists() or state_of(pid) == "Z"
    assert cluster.node_state("node1") == "IDLE"


def test_a_start_removes_what_a_killed_suite_left_and_nothing_of_a_living_one(cluster: Cluster) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    left = f"{PREFIX}-{ended.pid}-node1"
    subprocess.run(["ip", "netns", "add", left], check=True)
    remove_leftovers()
    assert not namespaces_of(ended.pid)
    assert len(namespaces_of(os.getpid())) == 3


def test_removing_a_namespace_succeeds_when_it_does_not_exist(cluster: Cluster) -> None:
    assert pids_in(f"{PREFIX}-none") == []
    remove_namespace(f"{PREFIX}-none")


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"^{PREFIX}-{pid}-\S+", listed, re.MULTILINE)


def state_of(pid: int) -> str:
    """Such as Z, ended but not yet reaped by whoever is its parent now."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
