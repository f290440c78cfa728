"""Processes of a DataLoader: they don't stay behind in ``fork``, and they end with the training process.

Before Python 3.12 the child of a fork may hang for ever, before any code of its own: if a thread that isn't Python's, such as
gloo's that let go of tensors, takes Python's lock of threads at that moment, the child waits for a lock that nobody holds any
more (in ``_PyThreadState_DeleteExcept``). So each child answers, and waits for leave, before it does anything; one that doesn't
answer is ended, and another one is forked.
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

PATIENCE_S = (5.0, 10.0, 20.0, 40.0, 80.0)
"""How long each attempt waits for an answer; on a busy machine it may come late."""


class LoaderProcess(ForkProcess):
    """A process that has answered once it is started.

    Raises:
        TimeoutError: on ``start()``: of all attempts none has answered.
    """

    trainer: socket.socket
    loader: socket.socket

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:  # what multiprocessing forks by; there is no public name for it
        assert isinstance(process_obj, LoaderProcess)
        for patience in PATIENCE_S:
            process_obj.trainer, process_obj.loader = socket.socketpair()
            child = ForkProcess._Popen(process_obj)
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
                return  # the trainer is gone
        super().run()


class LoaderContext(ForkContext):
    """For a DataLoader's ``multiprocessing_context``."""

    Process = LoaderProcess


def serve_trainer(trainer: int, worker: int) -> None:
    """Has a loader process end with the training process, however that ends, or at a SIGTERM of it; and ignore Ctrl-C and the
    warnings of a scheduler.

    Those may go to every process of a job, and the training process needs its workers to finish the step.

    Args:
        trainer: process that forked this one, from a thread that lives as long as it does.
        worker: number of this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(1)  # it ended before it could be bound to
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=end_with_trainer, args=(trainer,), name="signals", daemon=True).start()


def end_with_trainer(trainer: int) -> None:
    """Takes signals, which a handler couldn't tell the sender of, until one comes from that process."""
    while (received := signal.sigwaitinfo(STOP_SIGNALS)).si_pid != trainer or received.si_signo != signal.SIGTERM:
        pass
    os._exit(0)
