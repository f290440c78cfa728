"""A Slurm cluster of a controller and two nodes on this machine, each in a network namespace of its own.

The namespaces are joined by a bridge inside the controller's, so the machine's own network has no interface, address or route
of theirs. The file system, the processes' numbers and /dev/shm are the machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

PREFIX = "svite-slurm"
CONTROLLER, NODES = "ctl", ("node1", "node2")
ADDRESSES = {name: f"10.213.0.{number}" for number, name in enumerate((CONTROLLER, *NODES), start=1)}
GPUS_PER_NODE = 2
"""That jobs can ask for; they are made of /dev/null, and processes find none."""

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "ip", "unshare", "mount", "hostname")
DEADLINE_S = 300
"""Longest that anything may take that takes seconds on an idle machine."""

SLURM_CONF = """
ClusterName=svite
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes={node_names} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be brought up here; None where it can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge iproute2"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    try:
        if made.returncode == 0:
            made = subprocess.run(_inside(probe, "probe", "true"), capture_output=True, text=True, check=False)
        return None if made.returncode == 0 else f"can't make network namespaces: {made.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)


class Cluster:
    """Two nodes and their controller. Its daemons, namespaces and jobs' processes end with :meth:`stop`."""

    def __init__(self, folder: Path) -> None:
        """Starts it, and waits until both nodes are idle.

        Args:
            folder: for its files, on a path that isn't there yet.
        """
        remove_leftovers()
        self.folder = folder
        self.names = {host: f"{PREFIX}-{os.getpid()}-{host}" for host in ADDRESSES}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.keeper = start_keeper(self.names.values())
        try:
            self._write_files()
            self._connect()
            self.daemons[CONTROLLER] = self._start(CONTROLLER, "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait_until(lambda: all(self.node_state(node) == "IDLE" for node in NODES), "both nodes are idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends every process in the namespaces, by its number, and deletes them."""
        self.keeper.communicate()
        for daemon in self.daemons.values():
            daemon.wait()
        self.daemons.clear()

    def command(self, *words: str, host: str = CONTROLLER, env: Mapping[str, str] | None = None) -> str:
        """What a command prints, run on one of the hosts with this process's environment and ``env``.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            _inside(self.names[host], host, *words),
            env=self.environment | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """Of commands and, through sbatch, of jobs: this process's, without what belongs to another job, and with this Python's
        programs first in the path.
        """
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return plain | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path, "OMP_NUM_THREADS": "1"}

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says of it, by field."""
        shown = self.command("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def node_state(self, node: str) -> str:
        return re.findall(r"State=([A-Z]+)", self.command("scontrol", "show", "node", node))[0]

    def kill_node(self, node: str) -> None:
        """SIGKILL to every process of a node at once, its daemon among them."""
        for pid in pids_in(self.names[node]):
            _kill(pid)
        self.daemons.pop(node).wait()

    def start_node(self, node: str) -> None:
        self.daemons[node] = self._start(node, "slurmd", "-D")

    def wait_until(self, holds: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Polls until something holds.

        Raises:
            AssertionError: it didn't in time; the message has the ends of the daemons' logs.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain: {what}\n{self._ends_of_logs()}"
            time.sleep(0.2)

    def _ends_of_logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-12:]) for log in logs)

    def _write_files(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={ADDRESSES[node]} CPUs=4 RealMemory=2000 Gres=gpu:{GPUS_PER_NODE}" for node in NODES
        )
        conf = SLURM_CONF.format(
            folder=self.folder,
            controller=CONTROLLER,
            controller_address=ADDRESSES[CONTROLLER],
            nodes=nodes,
            node_names=",".join(NODES),
        )
        (self.folder / "slurm.conf").write_text(conf)
        # Without it slurmd looks for a hierarchy of cgroups that a namespace doesn't show, and dies.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
        for name in self.names.values():
            # Where ``ip netns exec`` finds what /etc/hosts is to be inside.
            folder = Path("/etc/netns", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)

    def _connect(self) -> None:
        for name in self.names.values():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        bridge = self.names[CONTROLLER]
        _ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        for node in NODES:
            _ip("-n", bridge, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", self.names[node])
            _ip("-n", bridge, "link", "set", node, "master", "bridge", "up")
        for host, interface in ((CONTROLLER, "bridge"), *((node, "eth0") for node in NODES)):
            _ip("-n", self.names[host], "address", "add", f"{ADDRESSES[host]}/24", "dev", interface)
            _ip("-n", self.names[host], "link", "set", interface, "up")

    def _start(self, host: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{words[0]}-{host}.out.log").open("ab") as output:
            return subprocess.Popen(
                _inside(self.names[host], host, *words), env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )


def start_keeper(names: Iterable[str]) -> subprocess.Popen[bytes]:
    """A process that removes namespaces once its standard input ends: when it is closed, or when this process ends, however."""
    command = [sys.executable, "-m", __name__, *names]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, start_new_session=True)


def remove_leftovers() -> None:
    """Clears the namespaces of clusters whose test process was killed, and the keeper too."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(rf"^({PREFIX}-(\d+)-\S+)", listed, re.MULTILINE):
        if not Path("/proc", pid).exists():
            remove_namespace(name)


def remove_namespace(name: str) -> None:
    """Kills the processes in a network namespace, and deletes it and its hosts file, as far as there are any."""
    deadline = time.monotonic() + DEADLINE_S
    while (pids := pids_in(name)) and time.monotonic() < deadline:
        for pid in pids:
            _kill(pid)
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def pids_in(name: str) -> list[int]:
    """Processes of a network namespace that haven't ended; empty where there is no such namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in listed.split()]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _inside(name: str, host: str, *words: str) -> list[str]:
    """A command line that runs one in a network namespace, under a host name."""
    named = 'hostname "$0"; exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, host, *words]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


if __name__ == "__main__":
    sys.stdin.read()
    for kept in sys.argv[1:]:
        remove_namespace(kept)
