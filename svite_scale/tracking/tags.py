"""Tags that say which code a run executes, and where."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

GIT_S = 10.0
"""Longest wait in seconds for git."""


def start_tags() -> dict[str, str]:
    """Returns the tags of this start: the command, the host, git's revision and Slurm's job where there is one."""
    tags = {"host": socket.gethostname(), "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    if revision := git_revision():
        # MLflow's page shows the second one in its list of runs.
        tags |= {"git_revision": revision, "mlflow.source.git.commit": revision.removesuffix("-dirty")}
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm_job_id"] = job
    return tags


def git_revision() -> str | None:
    """Returns the revision of this code, 40 digits, with ``-dirty`` if files have changed since; None without git."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
