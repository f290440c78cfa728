"""What each rank of a job leaves in a folder, whatever launcher started it: its output, and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from svite_scale.distributed import World
from svite_scale.errors import ConfigError


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
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)
    status = 1  # of an exception that nobody caught
    try:
        status = command(arguments)
    finally:
        path.with_suffix(".status").write_text(f"{status}\n")
    return status
