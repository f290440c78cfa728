"""Real ranks for tests: processes that stay up, joined over gloo on loopback, and run one function after another.

Importing an engine costs seconds, so the ranks of a world size start once for the whole test session, forked from a server that
has imported it.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240
"""Longest that one function may take on the ranks; a hang becomes a failure."""

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of its threads to its file, whatever it waits for."""


# A process has one such server, which imports what the last module that was imported before its start asks for: so all
# modules of tests ask for the same.
forked = multiprocessing.get_context("forkserver")
"""Starts processes that have imported what training imports."""
forked.set_forkserver_preload(["tests.preloaded"])


class Ranks:
    """``world_size`` processes of one process group."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.stacks = [Path(self.folder.name, f"rank-{rank}") for rank in range(world_size)]
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = forked.Pipe()
            process = forked.Process(target=_serve, args=(theirs, rank, world_size, port, self.stacks[rank]), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs ``function(*args)`` on every rank, and returns what each returned.

        Raises:
            AssertionError: a rank raised, died, or took longer than TIMEOUT_S. The message holds its traceback, or the stacks
                of all threads of all ranks.
        """
        for connection in self.connections:
            connection.send((function, args))
        results = []
        for rank, connection in enumerate(self.connections):
            try:
                answered = connection.poll(TIMEOUT_S)
                ok, result = connection.recv() if answered else (False, f"no answer in {TIMEOUT_S} s\n{self._dumped()}")
            except EOFError:
                ok, result = False, f"died with exit code {self.processes[rank].exitcode}"
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank} of {len(self.connections)}: {result}")
            results.append(result)
        return results

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def _dumped(self) -> str:
        """Returns the stacks of all threads of all ranks."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, DUMP_SIGNAL)  # type: ignore[arg-type]
        time.sleep(1)
        return "\n".join(f"rank {rank}:\n{stacks.read_text()}" for rank, stacks in enumerate(self.stacks))


_started: dict[int, Ranks] = {}


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs a module-level function on every rank of a world; ``torch.distributed`` is up in it."""
    sys.audit("tests.run_on_ranks")
    ranks = _started.get(world_size)
    if ranks is None or not all(process.is_alive() for process in ranks.processes):
        if not _started:
            atexit.register(close_all)
        ranks = _started[world_size] = Ranks(world_size)
    return ranks.run(function, *args)


@cache
def run_on_ranks_once(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """As :func:`run_on_ranks`, but calls with equal arguments share one result."""
    return run_on_ranks(world_size, function, *args)


def close_all() -> None:
    """Ends every started rank."""
    for ranks in _started.values():
        ranks.close()
    _started.clear()


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(connection: Connection, rank: int, world_size: int, port: int, stacks: Path) -> None:
    faulthandler.register(DUMP_SIGNAL, stacks.open("w"), all_threads=True)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    # Where this Python's ninja is: DeepSpeed compiles its op anew whenever it finds another version of ninja.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
