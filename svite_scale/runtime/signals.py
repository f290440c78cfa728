"""Signals that ask this process to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send before they kill; SIGUSR1 is what ours asks Slurm for."""

SAME_SIGNAL_S = 2.0


class StopSignals:
    """From entering to leaving, the first of :data:`STOP_SIGNALS` sets :attr:`received`, and a second one ends the process.

    One that comes within :data:`SAME_SIGNAL_S` of the first is the first again: batch systems signal launchers and ranks alike,
    and launchers pass theirs on.

    Python runs signal handlers between two instructions of the main thread, so never while that waits for other ranks in a
    collective. Hence a thread reads the numbers of signals from the descriptor to which Python writes them at once.

    Attributes:
        received: whether a signal came.
        saved_status: None as long as a second signal ends the process with the status of one that a signal killed; then what
            the process would end with anyway.
    """

    def __init__(self) -> None:
        self.received = False
        self._first_at: float | None = None
        self.saved_status: int | None = None

    def __enter__(self) -> StopSignals:
        """Main thread only. Before loader workers and process groups start."""
        global _active
        assert _active is None, "signals of a process are handled once"
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, _leave_to_the_thread) for number in STOP_SIGNALS}
        _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _active
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        _active = None
        # Processes that were forked meanwhile, such as a loader's, hold the socket too, so closing it alone ends nothing.
        self._writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _listen(self) -> None:
        while number := self._reader.recv(1):
            # Signals that others handle arrive here too.
            if number[0] in STOP_SIGNALS:
                self._receive(number[0])

    def _receive(self, number: int) -> None:
        if self.saved_status is not None:
            os._exit(self.saved_status)
        if self._first_at is None:
            self._first_at, self.received = time.monotonic(), True
        elif time.monotonic() - self._first_at > SAME_SIGNAL_S:
            os._exit(128 + number)


_active: StopSignals | None = None


def _leave_to_the_thread(*_: object) -> None:
    """A handler must be set for Python to write the signal's number."""


def _forget_in_child() -> None:
    """A forked process, such as a loader's worker, would write its own signals to its parent's descriptor."""
    global _active
    if _active is not None:
        signal.set_wakeup_fd(-1)
        # Those that this process found: batch systems signal all processes of a job, and may start it with signals ignored.
        for number, handler in _active._old_handlers.items():
            signal.signal(number, handler)
        _active = None


os.register_at_fork(after_in_child=_forget_in_child)
