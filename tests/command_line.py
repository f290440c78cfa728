"""``launch/train.py``, in this process and in others."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from svite_scale.runtime import ending
from svite_scale.train import command

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "train.py"
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID")


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    status: int
    out: str
    err: str


def run_here(
    capsys: pytest.CaptureFixture[str], *arguments: str, launcher: Mapping[str, str] | None = None, script: Path = SCRIPT
) -> Answer:
    """Runs a script in this process, as plain ``python`` would, or with a launcher's variables."""
    plain = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    logger = logging.getLogger("svite_scale")
    level = logger.level
    capsys.readouterr()
    with (
        patch.object(sys, "argv", [str(script), *arguments]),
        # The last call of a training process would end this one.
        patch.object(ending, "end_process", sys.exit),
        # No launcher ends the ranks that wait for it.
        patch.object(command, "FIRST_RANK_SPEAKS_S", 0.0),
        patch.dict(os.environ, {**plain, **(launcher or {})}, clear=True),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(script), run_name="__main__")
    logger.setLevel(level)  # Ranks other than the main one are quieter; the tests that follow in this process aren't.
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return Answer(end.value.code, captured.out, captured.err)


def run_command(*command: str, timeout: float = 500.0) -> Answer:
    """Runs a command on CPUs, with this Python's programs first in the path and one thread in each process.

    Raises:
        AssertionError: it took longer than ``timeout`` seconds; the message holds the stacks of its Python processes.
    """
    plain = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**plain, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            _, err = process.communicate(timeout=10)
            raise AssertionError(f"{' '.join(command)}: no end in {timeout} s\n{err}") from None
    return Answer(process.returncode, out, err)
