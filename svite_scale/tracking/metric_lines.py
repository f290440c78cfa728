"""Files of a run that grow by a line of JSON at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from svite_scale.runtime.durable import replace_durably

logger = logging.getLogger("svite_scale")


class MetricLines:
    """One such file. Each line is handed to the system at once, so that a kill loses none.

    Lines that a full or vanished disk doesn't take wait in memory, and are written before the next one: training goes on.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, line: Mapping[str, object]) -> None:
        """Adds a line; says so once where it has to wait."""
        is_first = not self._waiting
        self._waiting.append(json.dumps(line).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if is_first:
                logger.warning(
                    "%s can't be written (%s); its lines wait until it can be, and the run goes on", self.path, error
                )

    def close(self) -> None:
        """Tries once more to write what waits, and says what is lost."""
        try:
            self._write()
        except OSError as error:
            logger.warning("%s lacks its last %d lines: %s", self.path, len(self._waiting), error)

    def cut(self, last_step: int) -> None:
        """Drops the lines after a step, and what a kill has left of one: a run that goes on from there writes them anew.

        Raises:
            OSError: the file can't be written; it is as it was.
        """
        self._waiting = [line for line in self._waiting if is_until(last_step, line)]
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            replace_durably(self.path, "".join(f"{line.decode()}\n" for line in lines if is_until(last_step, line)))

    def _write(self) -> None:
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
    """Whether a line is whole, and of a step up to that one."""
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
