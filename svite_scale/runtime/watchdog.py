"""A rank that dies or hangs ends the whole job, with its name."""

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
"""In the store: what ends the job, once there is something."""

GONE = "it was killed or stopped, or is cut off"

LONGEST_INTERVAL_S = 1.0
STARTING_S = 1800.0
"""Progress may take this long, if the timeout isn't longer, until all ranks have done a step: ops and kernels are compiled."""


class Watchdog:
    """Watches over all ranks from entering to leaving.

    One thread of each rank writes its beat (step, phase, progress) into the store and reads that of rank 0, on rank 0 those of
    all. Another judges: a rank without beats is gone; where nobody progresses, the rank with the least progress is it. The
    first one to say so prints one line to stderr, and every process ends with status 1, whatever its main thread waits for:
    threads run while that is in a collective. One that is stopped, so that it can't end, is killed by those beside it. Two
    threads, because a request to a store whose process is stopped never returns; then it is rank 0, or its node, that is gone.

    A collective that fails tells of a rank that died, but not of which; :meth:`find_gone` waits some beats to find out. Any
    error that leaves the context is told to the other ranks, which end too.

    Until it is left, so also where training is over and this rank waits on its way out, a rank that doesn't get on ends its
    process with the status that its activity names.
    """

    def __init__(self, store: dist.Store, world: World, activity: Activity, timeout_s: float) -> None:
        """A collective.

        Args:
            store: shared by all ranks. Requests that hang hold up this one only, for it is cloned.
            world: this rank's.
            activity: what this rank is doing.
            timeout_s: seconds from the last beat, or the last progress, to the end of all processes.
        """
        self.store, self.world, self.activity = store.clone(), world, activity
        self.interval = min(LONGEST_INTERVAL_S, timeout_s / 20)
        # The rest of the timeout is for the news to get around.
        self.limit = 0.75 * timeout_s
        self.starting_limit = max(self.limit, STARTING_S)
        # Where a collective has failed; beats come late on a busy machine.
        self.short_limit = min(self.limit, max(4 * self.interval, 2.0))
        self.host = socket.gethostname()
        self.heartbeats = Heartbeats()
        self._sequence, self._heard_at = 0, time.monotonic()
        self._someone_failed = self._ends_all = False
        self._left = threading.Event()
        if world.is_main:
            self.store.set(VERDICT, NO_VERDICT)
        self._beat()
        dist.barrier()
        # A rank that is gone before the first interval is over is named too.
        self._read()

    def __enter__(self) -> Watchdog:
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange_beats, self._judge)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(2 * self.interval)
        # A mistake in the config is the same on all ranks, which get to it by themselves.
        if error is not None and not isinstance(error, ConfigError) and self.world.size > 1:
            # The others end when they read it.
            self._publish(f"{self._own_beat()} failed")

    def find_gone(self, error: BaseException) -> None:
        """Where an error is one of a collective, waits until the rank that is gone would have been missed, and ended this one.

        Args:
            error: that ends this rank.
        """
        if is_of_collective(error) and self.world.size > 1 and not self._someone_failed:
            self._someone_failed = True
            time.sleep(self.short_limit + 4 * self.interval)

    def _exchange_beats(self) -> None:
        """Writes and reads beats until this rank leaves."""
        while not self._left.wait(self.interval):
            try:
                self._beat()
                self._read()
                self._heard_at = time.monotonic()
            except RuntimeError:
                # A connection that failed once fails for ever. How long for is what counts; the judge sees to that.
                return
        try:
            self._beat()
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

    def _beat(self) -> None:
        self._sequence += 1
        self.store.set(_beat_key(self.world.rank), self._own_beat().encode())

    def _read(self) -> None:
        ranks = range(self.world.size) if self.world.is_main or self._someone_failed else [0]
        verdict, *beats = self.store.multi_get([VERDICT, *map(_beat_key, ranks)])
        if verdict.decode() != NO_VERDICT and not self._ends_all:
            self._end_stopped(json.loads(verdict)["gone"])
            os._exit(self.activity.exit_status)
        for beat in beats:
            self.heartbeats.see(Beat.decode(beat), time.monotonic())

    def _judge(self) -> None:
        """Looks for a rank that is gone or stuck, until this one leaves."""
        looked_at = entered_at = time.monotonic()
        progress = self.activity.progress
        while not self._left.wait(self.interval):
            now = time.monotonic()
            if now - looked_at > self.limit / 2:
                # This process was itself stopped, or had no processor.
                self.heartbeats.restart(now)
                self._heard_at = entered_at = now
            looked_at = now
            if progress != self.activity.progress:
                progress, entered_at = self.activity.progress, now
            # The others may be gone already, and the store with them.
            hangs = self.activity.leaving and now - entered_at > self.limit
            line = f"{self._own_beat()}: no progress for {self.limit:.0f} s" if hangs else self._verdict(now)
            if line is not None:
                # Where this rank waits tells the step of one whose last beat came before its last step.
                self._end_all(f"{line}; {self._own_beat()} ends the job", self.heartbeats.silent(now, self._patience))

    @property
    def _patience(self) -> float:
        """Seconds without a beat after which a rank is gone."""
        return self.short_limit if self._someone_failed else self.limit

    def _verdict(self, now: float) -> str | None:
        limit = self._patience
        if now - self._heard_at > limit:
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
        """Ends this process, after telling the others why, and who is gone."""
        self._ends_all = True
        told = self._publish(line, gone)
        self._end_stopped(beat.process for beat in gone)
        # Without a store one cannot agree on who speaks, so the first of each machine does.
        if told or (told is None and (self.world.rank == 1 or self.world.local_rank == 0)):
            self._print(line)
        if told and self.world.is_main:
            # With this process the store may go.
            time.sleep(max(3 * self.interval, 1.0))
        os._exit(self.activity.exit_status)

    def _publish(self, line: str, gone: Iterable[Beat] = ()) -> bool | None:
        """Writes the verdict; returns whether it is this rank's, or None where the store doesn't answer."""
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

    def _end_stopped(self, gone: Iterable[tuple[str, int]]) -> None:
        """Kills ranks of this machine that are gone, as far as their processes are still there."""
        for host, pid in gone:
            # Containers may share a host's name, but not this process's parent.
            if host == self.host and parent_of(pid) == os.getppid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _print(self, line: str) -> None:
        """One write, so that lines of several processes don't mix, and on a line of its own, beside a bar too."""
        os.write(2, f"\nerror: {line}\n".encode())


def is_of_collective(error: BaseException) -> bool:
    """Whether an error is what torch raises where another rank is gone: gloo's has no class of its own."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def parent_of(pid: int) -> int | None:
    """The number of a process's parent; None where there is no such process, or no ``/proc``."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _beat_key(rank: int) -> str:
    return f"watchdog/beat/{rank}"
