"""Loader processes, which never hang in ``fork`` and end with the training process.

Before Python 3.12 the child of a fork may hang for ever before it runs any code. This happens when a thread of a library, such
as gloo's that release tensors, holds Python's lock of threads at the moment of the fork. The child then waits for a lock that
none of its threads holds (in ``_PyThreadState_DeleteExcept``). So each child sends a byte first, and waits for one. A child
that sends nothing is ended, and another one is forked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

from svite_scale.runtime.signals import STOP_SIGNALS

PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``: the signal that the kernel sends to a process when its parent ends."""

UNHEEDED = (signal.SIGINT, *STOP_SIGNALS)
"""Signals that don't end a loader process: Ctrl-C and the warnings of a scheduler may go to every process of a job, and the
training process needs its workers to finish the step."""

PATIENCE_S = (5.0, 10.0, 20.0, 40.0, 80.0)
"""Time that each attempt waits for the child's byte, which may come late on a busy machine."""


class LoaderProcess(ForkProcess):
    """A process that is known to run once it is started.

    Raises:
        TimeoutError: by ``start()``; every attempt has hung in ``fork``.
    """

    trainer: socket.socket
    loader: socket.socket

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:  # the hook by which multiprocessing forks; it has no public name
        assert isinstance(process_obj, LoaderProcess)
        for patience in PATIENCE_S:
            process_obj.trainer, process_obj.loader = socket.socketpair()
            # The child inherits what is blocked, so none of these signals ever ends it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEEDED)
            try:
                child = ForkProcess._Popen(process_obj)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            process_obj.loader.close()
            with process_obj.trainer as trainer:
                trainer.settimeout(patience)
                try:
                    trainer.recv(1)
                    trainer.send(b"\0")
                    return child
                except TimeoutError:
                    child.kill()
                    child.wait()
                    child.close()
        raise TimeoutError(f"{len(PATIENCE_S)} were forked, and hung there")

    def run(self) -> None:
        self.trainer.close()
        with self.loader as loader:
            loader.send(b"\0")
            if not loader.recv(1):
                return  # the training process has ended
        super().run()


class LoaderContext(ForkContext):
    """The ``multiprocessing_context`` of a DataLoader."""

    Process = LoaderProcess


def serve_trainer(trainer: int, worker: int) -> None:
    """Prepares a loader process: it ends with the training process, or when that sends SIGTERM.

    Args:
        trainer: id of the process that forked this one, from a thread that lives as long as the process.
        worker: number of this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(1)  # the training process ended before the call above
    threading.Thread(target=end_with_trainer, args=(trainer,), name="signals", daemon=True).start()


def end_with_trainer(trainer: int) -> None:
    """Waits for a SIGTERM from the training process, then ends this one. (A signal handler wouldn't know the sender.)

    The signals that it waits for are blocked since the fork.
    """
    while (received := signal.sigwaitinfo(STOP_SIGNALS)).si_pid != trainer or received.si_signo != signal.SIGTERM:
        pass
    os._exit(0)
