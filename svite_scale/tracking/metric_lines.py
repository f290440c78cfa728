"""Files of a run that grow by one line of JSON at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from svite_scale.runtime.durable import replace_durably
from svite_scale.tracking.backlog import Backlog


class MetricLines:
    """One such file. The system gets each line at once, so a kill loses none.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._backlog: Backlog[bytes] = Backlog(str(path), "lines", self._write)

    def append(self, line: Mapping[str, object]) -> None:
        """Adds a line, which waits if the disk doesn't take it."""
        self._backlog.add([json.dumps(line).encode() + b"\n"])

    def close(self) -> None:
        """Writes the lines that wait, or warns that they are lost."""
        self._backlog.close()

    def cut(self, last_step: int) -> None:
        """Removes the lines after a step, and a half-written last line: a run that resumes from that step writes them again.

        Raises:
            OSError: the file can't be written. Its content is unchanged.
        """
        self._backlog.waiting = [line for line in self._backlog.waiting if is_until(last_step, line)]
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            replace_durably(self.path, "".join(f"{line.decode()}\n" for line in lines if is_until(last_step, line)))

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"".join(self._backlog.waiting)
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(size)
                raise
        self._backlog.waiting = []


def is_until(last_step: int, line: bytes) -> bool:
    """Returns whether a line is complete, and of a step up to ``last_step``."""
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
