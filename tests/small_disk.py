"""A disk that can be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """A file system of 8 MB at a new folder; skips the test where it can't be had."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system to fill")
    path.mkdir()
    answer = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(path)], capture_output=True, text=True)
    if answer.returncode:
        pytest.skip(f"a small file system to fill can't be mounted here: {answer.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Writes a file until the disk takes no more byte."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
