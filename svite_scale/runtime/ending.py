"""How a process of a run ends: it reports why it failed, and exits."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from svite_scale.errors import ConfigError, DivergedError, SviteScaleError
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.signals import Preempted
from svite_scale.runtime.world import World

EXIT_FAILED, EXIT_CONFIG = 1, 2


class Failure:
    """Reports the error that ends this rank: once, and at once, because closing things down may wait for other ranks.

    Attributes:
        world: of this rank, once it is known.
    """

    def __init__(self, explain: Callable[[BaseException], BaseException]) -> None:
        """``explain`` returns the error to print instead of one that a library raised."""
        self.world = World()
        self._explain = explain
        self._reported: BaseException | None = None

    def report(self, error: BaseException, activity: Activity | None = None) -> int:
        """Prints an error to stderr: one of the user's in one line, any other with its traceback.

        Returns:
            The exit status.
        """
        shown = self._explain(error)
        if error is not self._reported:
            self._reported = error
            self._print(shown, activity)
        return EXIT_CONFIG if isinstance(shown, ConfigError) else EXIT_FAILED

    def _print(self, error: BaseException, activity: Activity | None) -> None:
        new_line = "" if self.world.is_main else "\n"  # the main rank's progress bar may stand on the current line
        # All ranks of a machine find the same mistake in the config, and all ranks of the job see a run diverge.
        if isinstance(error, ConfigError):
            lines = f"config error: {error}" if self.world.local_rank == 0 else ""
        elif isinstance(error, DivergedError):
            lines = f"error: {error}" if self.world.is_main else ""
        elif isinstance(error, SviteScaleError):
            lines = f"{new_line}error on rank {self.world.rank}: {error}"
        else:
            where = f" (after step {activity.step}, {activity.phase})" if activity else ""
            who = f"rank {self.world.rank} on {socket.gethostname()}{where}"
            trace = "".join(traceback.format_exception(error))
            lines = f"{new_line}{trace}error: {who} failed: {type(error).__name__}: {error}".rstrip()
        if lines:
            print(lines, file=sys.stderr, flush=True)


@contextmanager
def reporting(report: Callable[[BaseException], object]) -> Iterator[None]:
    """Reports an error that leaves the context. :class:`Preempted` is none."""
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        report(error)
        raise


def leave_to_the_caller(error: BaseException) -> None:
    """Reports nothing."""


def run_process(command: Callable[[], int]) -> NoReturn:
    """Runs a command, and ends this process with the status that it returns, or with 1 if it raises."""
    status = EXIT_FAILED
    try:
        status = command()
    except BaseException:
        traceback.print_exc()
    finally:
        end_process(status)


def end_process(status: int) -> NoReturn:
    """Ends this process at once. Python's own way out waits for threads, loader processes and libraries, and these may wait for
    ever for a rank that is gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
