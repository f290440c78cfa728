"""A folder of files whose bytes are bounded, shared by the processes of a machine."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

JUST_NOW_S = 1.0
"""Files used within this time aren't evicted: processes that waited for them may be about to open them."""
WAIT_S = 0.05
"""Between two looks for room, while other files are being written or were just used."""
PART, LOCKS, ROOM = ".part", "locks", "room"
NAME = re.compile("[0-9a-f]{16}-")
"""What the files of a cache begin with. Others that a folder holds aren't counted, and never removed."""


class CacheFolder:
    """Whole files by name, of at most ``limit`` bytes.

    - A file has its name only when it is whole; until then it is its name with ``.part``, and its writer holds its lock. Locks
      are the kernel's (``flock``) and end with their process, so what a killed writer left is known by a lock that is free.
    - Room is taken before the first byte is written, so files being written count in full. Files come and go, and are
      counted, under one lock.
    - The least recently used files go first. One that is open in some process stays readable there, until it is closed.

    - What isn't a file of this user's alone, such as a link that others have put in its place, counts as not there.

    The folder must be on a local disk: locks and times of use are this machine's. All methods may raise OSError.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        """Does nothing yet; ``directory`` is created at the first use."""
        self.directory, self.limit = directory, limit

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keeps the other processes and threads that ask for the same name waiting."""
        descriptor = self._lock_file(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            release(descriptor)

    def open(self, name: str, size: int) -> int | None:
        """A descriptor of a whole file of that size, which counts as used now; None if there is none."""
        descriptor = open_own(self.directory / name)
        if descriptor is None:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def add(self, name: str, size: int, write: Callable[[int], None]) -> int:
        """Makes a file of ``size`` bytes, and waits for room if need be. The caller holds the name's lock.

        Args:
            name: of the file.
            size: of it, at most the limit; the room is allocated on the disk.
            write: fills the descriptor that it is given from position 0 on; if it raises, there will be no file.

        Returns:
            The descriptor; the file may be evicted before anyone else has opened it.
        """
        assert size <= self.limit, "it would wait for room for ever"
        part = self.directory / (name + PART)
        descriptor = self._take_room(part, size)
        try:
            if size:
                os.posix_fallocate(descriptor, 0, size)
            write(descriptor)
            # Before it has its name, or a power failure could leave a whole file of zeros.
            os.fsync(descriptor)
            with self.locked(ROOM):
                part.rename(self.directory / name)
        except BaseException:
            os.close(descriptor)
            with self.locked(ROOM):
                part.unlink(missing_ok=True)
            raise
        return descriptor

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self.locked(ROOM):
            (self.directory / name).unlink(missing_ok=True)

    def _take_room(self, part: Path, size: int) -> int:
        """A new file of ``size`` bytes, once others have made room for it."""
        while True:
            with self.locked(ROOM):
                part.unlink(missing_ok=True)
                if self._make_room(size):
                    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                    os.truncate(descriptor, size)
                    return descriptor
            time.sleep(WAIT_S)

    def _make_room(self, size: int) -> bool:
        """Evicts what must go; whether ``size`` bytes fit now. The caller holds the lock of the room."""
        entries = [entry for entry in os.scandir(self.directory) if NAME.match(entry.name)]
        files = [(entry.name, entry.stat()) for entry in entries if entry.is_file(follow_symlinks=False)]
        excess = sum(status.st_size for _, status in files) + size - self.limit
        for name, status in sorted(files, key=lambda file: file[1].st_mtime):
            if excess <= 0:
                break
            # A time that is still to come is a clock's that was set back.
            used_just_now = 0 <= time.time() - status.st_mtime < JUST_NOW_S
            if self._is_being_written(name) if name.endswith(PART) else used_just_now:
                continue
            (self.directory / name).unlink()
            excess -= status.st_size
        return excess <= 0

    def _is_being_written(self, part_name: str) -> bool:
        descriptor = self._lock_file(part_name.removesuffix(PART))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return True
        release(descriptor)
        return False

    def _lock_file(self, name: str) -> int:
        locks = self.directory / LOCKS
        locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(locks / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def open_own(path: Path) -> int | None:
    """A descriptor of a file that nobody but this user may write; None where there is none, or something else."""
    try:
        # Not to wait for a writer where it is a named pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return descriptor
    os.close(descriptor)
    return None


def release(lock_file: int) -> None:
    """Ends a lock. Closing alone would leave it to processes that another thread has forked meanwhile."""
    fcntl.flock(lock_file, fcntl.LOCK_UN)
    os.close(lock_file)
