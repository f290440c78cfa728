"""A training job of several real processes, one of which goes wrong at a given step.

The processes are forked from a server that has imported what takes seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import DUMP_SIGNAL, forked, free_port

DEADLINE_S = 200
"""A job that takes longer is stuck."""


@dataclass(frozen=True)
class Fault:
    """A fault that strikes a rank when it asks for the data of a step."""

    rank: int
    step: int
    kind: str
    """The name of a signal that the rank sends itself; ``sleep`` for ever; ``raise`` a ``SystemExit``."""
    times: int = 1

    def strike(self) -> None:
        if self.kind == "sleep":
            time.sleep(10_000)
        if self.kind == "raise":
            raise SystemExit("a mistake of ours")
        for _ in range(self.times):
            os.kill(os.getpid(), getattr(signal, self.kind))


@dataclass(frozen=True)
class Ended:
    """A rank's exit status, negative for a signal, and its output on stderr."""

    status: int | None
    err: str


class Job:
    """The ranks of one training command."""

    def __init__(
        self,
        world_size: int,
        config: Path,
        *overrides: str,
        fault: Fault | None = None,
        inject: Callable[[], None] | None = None,
        resume: bool = False,
    ) -> None:
        """Starts the ranks. ``inject`` is called first in the last rank's process."""
        self.logs = [config.with_suffix(f".rank{rank}.err") for rank in range(world_size)]
        port = free_port()
        options = {"resume": resume, "auto_resume": False, "profile": None, "dry_run": False, "ranks": None}
        arguments = argparse.Namespace(config=str(config), overrides=list(overrides), **options)
        self.processes = [
            forked.Process(
                target=_rank, args=(rank, world_size, port, log, arguments, fault, inject if rank == world_size - 1 else None)
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def is_stopped(self, rank: int) -> bool:
        """Returns True if a rank has stopped itself by a signal."""
        return Path(f"/proc/{self.processes[rank].pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def wait(self, *ranks: int) -> list[Ended]:
        """Returns how the ranks, by default all, ended, and kills the rest.

        Raises:
            AssertionError: one of them hangs; the message holds the stacks of its threads.
        """
        deadline = time.monotonic() + DEADLINE_S
        waited = ranks or range(len(self.processes))
        try:
            for rank in waited:
                self.processes[rank].join(max(0.0, deadline - time.monotonic()))
                self._dump_if_alive(rank)
            ended = [Ended(self.processes[rank].exitcode, self.logs[rank].read_text()) for rank in waited]
            assert all(one.status is not None for one in ended), ended
            return ended
        finally:
            for process in self.processes:
                process.kill()
                process.join()

    def _dump_if_alive(self, rank: int) -> None:
        """Lets a rank that hangs write the stacks of its threads to its log."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, DUMP_SIGNAL)  # type: ignore[arg-type]
            time.sleep(1)


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until ``holds()`` is true, and fails after the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it didn't"
        time.sleep(0.05)


def _rank(
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    arguments: Any,
    fault: Fault | None,
    inject: Callable[[], None] | None,
) -> None:
    """Runs one rank, in a process group of its own, by which its loader processes are found."""
    os.setpgrp()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.register(DUMP_SIGNAL, 2, all_threads=True)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    from svite_scale.data.loader import Batch, TrainData
    from svite_scale.runtime.ending import run_process
    from svite_scale.train.command import main

    batches = TrainData.batches

    def faulty(self: TrainData, first_step: int = 0, last_step: int | None = None) -> Iterator[Batch]:
        for step, batch in enumerate(batches(self, first_step, last_step), start=first_step + 1):
            if fault is not None and (rank, step) == (fault.rank, fault.step):
                fault.strike()
            yield batch

    TrainData.batches = faulty  # type: ignore[method-assign]
    if inject is not None:
        inject()
    run_process(lambda: main(arguments, publish=lambda *_: None))
