"""The SQLite file of an MLflow address: shared by runs that start together, locked, damaged, deleted or replaced."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

BUSY_S = 5.0
"""Longest wait in seconds for a file that another process writes to. MLflow itself would wait a minute or two."""

LOCK_S = 120.0
"""Longest wait in seconds for other runs that start at the same time. MLflow makes a database in seconds, so one of them
hangs then."""


class SqliteFile:
    """A file that MLflow opens by an address."""

    def __init__(self, uri: str, path: Path) -> None:
        """``uri`` is the address, and ``path`` the file, which may not exist yet."""
        self.path, self._uri = path, uri
        self._opened_inode: int | None = None
        self._times_lost = 0

    @classmethod
    def from_uri(cls, uri: str) -> SqliteFile | None:
        """Returns the file of a SQLite address; None for another address."""
        scheme, _, path = uri.partition(":///")
        is_file = scheme.partition("+")[0] == "sqlite" and path
        return cls(uri, Path(path.partition("?")[0])) if is_file else None

    def opened(self) -> None:
        """Notes that MLflow has opened the file as it is now."""
        self._opened_inode = self._inode()

    def is_lost(self) -> bool:
        """Returns whether MLflow has opened another file, which has been deleted or replaced since."""
        return self._opened_inode is not None and self._inode() != self._opened_inode

    def address(self) -> str:
        """Returns the address by which MLflow opens the file as it is now. MLflow keeps a file open by its address even if the
        file is gone; the same path, written in another way, makes it open the new file.
        """
        self._times_lost += self.is_lost()
        if not self._times_lost:
            return self._uri
        folder, name = os.path.split(self.path)
        return self._uri.replace(str(self.path), os.path.join(folder, *["."] * self._times_lost, name), 1)

    def check_writable(self) -> None:
        """Checks that the file, which may be new, can be written to now.

        Raises:
            sqlite3.Error: it can't.
        """
        with closing(sqlite3.connect(self.path, timeout=BUSY_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the file against other runs: MLflow doesn't expect two of them to make it.

        Does without where a lock can't be had, as on some network file systems, or where another run keeps it too long.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            yield
            return
        try:
            wait_for_lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _inode(self) -> int:
        """Returns the number that identifies the file; 0 if there is none."""
        try:
            return self.path.stat().st_ino
        except OSError:
            return 0


def wait_for_lock(descriptor: int) -> None:
    """Locks a file, or gives up after :data:`LOCK_S`."""
    end = time.monotonic() + LOCK_S
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return
        else:
            return
