"""A file of JSON lines in the run directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from svite_scale.runtime.durable import replace_durably

logger = logging.getLogger("svite_scale")


class MetricLines:
    """A file with one JSON object per line. The system gets each line at once, so a kill loses none. Lines that a full disk
    doesn't take wait in memory; the run continues.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._has_warned = False

    def append(self, line: Mapping[str, object]) -> None:
        """Writes a line, after those that wait. Warns of the first failure in a row."""
        self._waiting.append(json.dumps(line).encode() + b"\n")
        try:
            self._write()
            self._has_warned = False
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s doesn't take lines (%s); they wait until it does, and the run continues", self.path, error)
            self._has_warned = True

    def close(self) -> None:
        """Writes the lines that wait, or warns that they are lost."""
        try:
            self._write()
        except OSError as error:
            logger.warning("%s lacks its last %d lines: %s", self.path, len(self._waiting), error)

    def cut(self, last_step: int) -> None:
        """Removes the lines after a step, and a half-written last line: a run that resumes from that step writes them again.

        Raises:
            OSError: the file can't be written. Its content is unchanged.
        """
        self._waiting = [line for line in self._waiting if is_until(last_step, line)]
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            replace_durably(self.path, "".join(f"{line.decode()}\n" for line in lines if is_until(last_step, line)))

    def _write(self) -> None:
        """Writes all waiting lines or none."""
        if not self._waiting:
            return
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"".join(self._waiting)
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(size)
                raise
        self._waiting = []


def is_until(last_step: int, line: bytes) -> bool:
    """Returns whether a line is complete, and of a step up to ``last_step``."""
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
