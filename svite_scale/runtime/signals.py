"""The signals that ask this process to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Batch systems send one of these before they kill. Our batch script asks Slurm for SIGUSR1."""

EXIT_PREEMPTED = 85
"""Exit status of a run that was stopped by a signal and has saved. Start it again with ``--resume``."""

SAME_SIGNAL_S = 2.0
"""Seconds after the first signal in which further ones count as the same: batch systems signal launchers and ranks alike, and
launchers pass the signal on."""


class Preempted(Exception):
    """Raised when a signal stopped the run and its state after ``step`` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal, saved after step {step}; resume with --resume")
        self.step = step


class StopSignals:
    """A context in which the first of :data:`STOP_SIGNALS` sets :attr:`received`, and a second one ends the process.

    Python runs a signal handler between two instructions of the main thread, so not while that thread waits in a collective.
    But Python writes the signal's number to a descriptor at once. A thread reads it from there.

    Attributes:
        received: whether a signal came.
        saved_status: exit status of a process that a second signal ends. While it is None, the status is that of a process that
            the signal killed.
    """

    def __init__(self) -> None:
        self.received = False
        self._first_at: float | None = None
        self.saved_status: int | None = None

    def __enter__(self) -> StopSignals:
        """Called by the main thread, before loader workers and process groups start."""
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
        # Forked processes, such as a loader's workers, hold the socket too. Closing it here wouldn't end the thread.
        self._writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _listen(self) -> None:
        while number := self._reader.recv(1):
            # Other signals that this process handles arrive here too.
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
    """Does nothing, but Python writes a signal's number only if it has a handler."""


def _forget_in_child() -> None:
    """Restores the handlers in a forked process, which would write its signals to its parent's descriptor otherwise."""
    global _active
    if _active is not None:
        signal.set_wakeup_fd(-1)
        # Not the default handlers: a batch system may start a process with signals ignored, and it signals children too.
        for number, handler in _active._old_handlers.items():
            signal.signal(number, handler)
        _active = None


os.register_at_fork(after_in_child=_forget_in_child)
