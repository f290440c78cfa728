"""Ends the whole job if a rank dies or hangs, and names that rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from svite_scale.errors import ConfigError
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.heartbeats import Beat, Heartbeats, name_ranks
from svite_scale.runtime.world import World

VERDICT, NO_VERDICT = "watchdog/verdict", "-"
"""Key in the store, and its first value. The verdict is what ends the job."""

GONE = "it was killed or stopped, or is cut off"

LONGEST_INTERVAL_S = 1.0
STARTING_S = 1800.0
"""Seconds that a phase may take at least until all ranks have done a step, because ops and kernels are compiled."""


class Watchdog:
    """Watches over all ranks, from entering the context to leaving it.

    Each rank runs two threads. One writes this rank's beat (step, phase, progress) into the store, and reads the beat of rank
    0; rank 0 reads all beats. The other one judges: a rank without new beats is gone, and if no rank makes progress, the rank
    with the least progress is stuck. The first rank to find one prints one line to stderr. Then every process ends with status
    1, even if its main thread waits in a collective. A stopped process can't end itself, so the other ranks on its machine
    kill it. Two threads are needed because a request to a store whose process is stopped never returns. In that case rank 0,
    or its node, is gone.

    A collective that fails shows that a rank died, but not which one: :meth:`find_gone` waits for some beats to find out. An
    error that leaves the context is published, so the other ranks end too.

    The watch includes the time after training in which this rank closes everything. If the rank makes no progress there, its
    process ends with the exit status of its activity.
    """

    def __init__(self, store: dist.Store, world: World, activity: Activity, timeout_s: float) -> None:
        """Writes the first beat and waits for that of all others. A collective: all ranks call it.

        Args:
            store: shared by all ranks; it is cloned, so that a request that hangs doesn't block the original.
            world: this rank's.
            activity: the step and the phase of this rank.
            timeout_s: seconds from the last beat, or the last progress, to the end of all processes.
        """
        self.store, self.world, self.activity = store.clone(), world, activity
        self.interval = min(LONGEST_INTERVAL_S, timeout_s / 20)
        # In the rest of the timeout, the other ranks read the verdict.
        self.limit = 0.75 * timeout_s
        self.starting_limit = max(self.limit, STARTING_S)
        # After a collective has failed. On a busy machine, beats come late.
        self.short_limit = min(self.limit, max(4 * self.interval, 2.0))
        self.host = socket.gethostname()
        self.heartbeats = Heartbeats()
        self._sequence, self._answered_at = 0, time.monotonic()
        self._collective_failed = self._ends_all = False
        self._left = threading.Event()
        if world.is_main:
            self.store.set(VERDICT, NO_VERDICT)
        self._write_beat()
        dist.barrier()
        # So a rank that is gone before the first interval is over can be named too.
        self._read_beats()

    def __enter__(self) -> Watchdog:
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange_beats, self._judge)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(2 * self.interval)
        # A mistake in the config is found by all ranks by themselves.
        if error is not None and not isinstance(error, ConfigError) and self.world.size > 1:
            # The other ranks end when they read it.
            self._publish(f"{self._own_beat()} failed")

    def find_gone(self, error: BaseException) -> None:
        """If a failed collective ends this rank, waits until the missing rank is found, which ends this process.

        Returns after some seconds if all ranks are still there.

        Args:
            error: the error that ends this rank.
        """
        if is_of_collective(error) and self.world.size > 1 and not self._collective_failed:
            self._collective_failed = True
            time.sleep(self.short_limit + 4 * self.interval)

    def _exchange_beats(self) -> None:
        """Writes and reads beats until this rank leaves."""
        while not self._left.wait(self.interval):
            try:
                self._write_beat()
                self._read_beats()
                self._answered_at = time.monotonic()
            except RuntimeError:
                # A connection that failed once never recovers. The judge ends this process after the time limit.
                return
        try:
            self._write_beat()
        except RuntimeError:
            return

    def _own_beat(self) -> Beat:
        activity = self.activity
        return Beat(
            rank=self.world.rank,
            host=self.host,
            pid=os.getpid(),
            sequence=self._sequence,
            step=activity.step,
            phase=activity.phase,
            progress=activity.progress,
            timed=activity.timed,
            finished=self._left.is_set(),
        )

    def _write_beat(self) -> None:
        self._sequence += 1
        self.store.set(_beat_key(self.world.rank), self._own_beat().encode())

    def _read_beats(self) -> None:
        ranks = range(self.world.size) if self.world.is_main or self._collective_failed else [0]
        verdict, *beats = self.store.multi_get([VERDICT, *map(_beat_key, ranks)])
        if verdict.decode() != NO_VERDICT and not self._ends_all:
            self._kill_stopped(json.loads(verdict)["gone"])
            os._exit(self.activity.exit_status)
        for beat in beats:
            self.heartbeats.record(Beat.decode(beat), time.monotonic())

    def _judge(self) -> None:
        """Looks for a rank that is gone or stuck, until this one leaves."""
        looked_at = entered_at = time.monotonic()
        progress = self.activity.progress
        while not self._left.wait(self.interval):
            now = time.monotonic()
            if now - looked_at > self.limit / 2:
                # This process itself was stopped, or got no processor time.
                self.heartbeats.restart(now)
                self._answered_at = entered_at = now
            looked_at = now
            if progress != self.activity.progress:
                progress, entered_at = self.activity.progress, now
            # The other ranks may be gone already, and the store with them.
            hangs = self.activity.leaving and now - entered_at > self.limit
            line = f"{self._own_beat()}: no progress for {self.limit:.0f} s" if hangs else self._verdict(now)
            if line is not None:
                # This rank's own step is added, because the last beat of a gone rank may be a step old.
                self._end_all(f"{line}; {self._own_beat()} ends the job", self.heartbeats.silent(now, self._patience))

    @property
    def _patience(self) -> float:
        """Seconds without a new beat after which a rank counts as gone."""
        return self.short_limit if self._collective_failed else self.limit

    def _verdict(self, now: float) -> str | None:
        """Returns the line that names the ranks that are gone or stuck, and the cause; None if all is well."""
        limit = self._patience
        if now - self._answered_at > limit:
            # Under torchrun its agent keeps the store.
            keeper = "the launcher" if dist.is_torchelastic_launched() else self.heartbeats.latest.get(0, "rank 0")
            return f"{keeper}: the store that it keeps hasn't answered for {limit:.0f} s; {GONE}"
        silent = self.heartbeats.silent(now, limit)
        if silent:
            return f"{name_ranks(silent)}: no sign of life for {limit:.0f} s; {GONE}"
        if not self.world.is_main:
            return None
        limit = self.limit if self.heartbeats.timed else self.starting_limit
        stuck = self.heartbeats.stuck(now, limit)
        if stuck:
            others = ", and the other ranks wait" if len(stuck) < self.world.size else ""
            return f"{name_ranks(stuck)}: no progress for {limit:.0f} s{others}"
        return None

    def _end_all(self, line: str, gone: list[Beat]) -> None:
        """Publishes why the job ends and which ranks are gone, then ends this process."""
        self._ends_all = True
        is_mine = self._publish(line, gone)
        self._kill_stopped(beat.process for beat in gone)
        # Without a store the ranks can't agree on one that prints, so the first rank of each machine prints.
        if is_mine or (is_mine is None and (self.world.rank == 1 or self.world.local_rank == 0)):
            self._print(line)
        if is_mine and self.world.is_main:
            # The store may end with this process, so the other ranks need time to read it.
            time.sleep(max(3 * self.interval, 1.0))
        os._exit(self.activity.exit_status)

    def _publish(self, line: str, gone: Iterable[Beat] = ()) -> bool | None:
        """Writes the verdict, unless there is one. Returns True if it is this rank's, None if the store doesn't answer."""
        answers: list[bool] = []
        mine = json.dumps({"by": self.world.rank, "line": line, "gone": [beat.process for beat in gone]})

        def write() -> None:
            try:
                answers.append(self.store.compare_set(VERDICT, NO_VERDICT, mine).decode() == mine)
            except RuntimeError:
                return

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(2 * self.interval)
        return answers[0] if answers else None

    def _kill_stopped(self, gone: Iterable[tuple[str, int]]) -> None:
        """Kills the processes of gone ranks that still exist on this machine."""
        for host, pid in gone:
            # Containers may share the name of a host, but not the parent of this process.
            if host == self.host and parent_of(pid) == os.getppid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _print(self, line: str) -> None:
        """Prints a line in one write, so that processes don't mix theirs. It begins a new line, because a bar may be there."""
        os.write(2, f"\nerror: {line}\n".encode())


def is_of_collective(error: BaseException) -> bool:
    """True if torch raised the error in a collective, because a rank is gone. gloo's error has no class of its own."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def parent_of(pid: int) -> int | None:
    """Returns the process id of a process's parent; None if there is no such process, or no ``/proc``."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _beat_key(rank: int) -> str:
    return f"watchdog/beat/{rank}"
