"""The output and the exit status of each rank, in files ``rank-N.log`` and ``rank-N.status`` of one folder.

Launchers have logs of their own, but each start of ``torchrun`` or ``deepspeed`` writes to new files in new places. Here the
names don't depend on the launcher, and a requeued job appends.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from svite_scale.errors import ConfigError
from svite_scale.runtime.world import World

if TYPE_CHECKING:
    from typing_extensions import Buffer


def run_logged(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Runs a command, appends all output of this process to ``LOG_DIR/rank-N.log``, and writes the exit status to
    ``LOG_DIR/rank-N.status``. A rank that is killed leaves no status.

    Args:
        command: takes the arguments, and returns an exit status.
        arguments: of the command, with ``log_dir`` among them; None writes no files.

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
        # The last start of the run may have left one.
        path.with_suffix(".status").unlink(missing_ok=True)
    except (ConfigError, OSError) as error:
        print(f"config error: --log-dir {arguments.log_dir}: {error}; name a folder that can be written", file=sys.stderr)
        return 2
    # By descriptor, because libraries in C write there too.
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        os.dup2(log, stream.fileno())
        buffer = io.BufferedWriter(LossyFile(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))
    os.close(log)
    status = 1  # of an uncaught exception
    try:
        status = command(arguments)
    finally:
        write_status(path.with_suffix(".status"), status)
    return status


class LossyFile(io.FileIO):
    """A file that drops what a full disk doesn't take: a run shouldn't end because its log can't be written."""

    def write(self, content: Buffer) -> int:
        try:
            return super().write(content)
        except OSError:
            return memoryview(content).nbytes


def write_status(path: Path, status: int) -> None:
    """Writes an exit status, or prints why it can't."""
    try:
        path.write_text(f"{status}\n")
    except OSError as error:
        print(f"error: the exit status {status} can't be written to {path}: {error}", file=sys.stderr)
