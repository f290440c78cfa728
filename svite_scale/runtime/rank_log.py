"""What each rank of a job leaves in a folder, whatever launcher started it: its output, and its exit status."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from svite_scale.errors import ConfigError
from svite_scale.runtime.ranks import World

if TYPE_CHECKING:
    from typing_extensions import Buffer


def run_logged(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Runs a command, with all output of this process appended to ``LOG_DIR/rank-N.log``, and leaves its exit status in
    ``LOG_DIR/rank-N.status``. A rank that was killed leaves no status.

    Args:
        command: from arguments to an exit status.
        arguments: ``log_dir``, and what the command takes; without a ``log_dir`` nothing is redirected or left.

    Returns:
        The command's exit status; 2 where the folder can't be written.
    """
    if arguments.log_dir is None:
        return command(arguments)
    try:
        rank = World.from_environment().rank
        path = Path(arguments.log_dir) / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        # Of the start before.
        path.with_suffix(".status").unlink(missing_ok=True)
    except (ConfigError, OSError) as error:
        print(f"config error: --log-dir {arguments.log_dir}: {error}; name a folder that can be written", file=sys.stderr)
        return 2
    # By descriptor, because libraries in C write too.
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        os.dup2(log, stream.fileno())
        buffer = io.BufferedWriter(Log(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))
    os.close(log)
    status = 1  # of an exception that nobody caught
    try:
        status = command(arguments)
    finally:
        leave(path.with_suffix(".status"), status)
    return status


class Log(io.FileIO):
    """A file that loses what a full disk doesn't take: that a log can't be written shouldn't end a run."""

    def write(self, content: Buffer) -> int:
        try:
            return super().write(content)
        except OSError:
            return memoryview(content).nbytes


def leave(path: Path, status: int) -> None:
    """Writes an exit status, or says why not."""
    try:
        path.write_text(f"{status}\n")
    except OSError as error:
        print(f"error: the exit status {status} can't be written to {path}: {error}", file=sys.stderr)
