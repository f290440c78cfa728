"""Remote shards and their indexes, fetched once per machine into a bounded folder that its processes share."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from svite_scale.data.options import DataConfig
from svite_scale.data.remote.fetch import INDEX_SUFFIX, FetchError, fetch, index_url, readable_name
from svite_scale.errors import DataError

RECENTLY_USED_S = 1.0
"""Files that were used within this time aren't evicted: a process that waited for one may be about to open it."""
WAIT_S = 0.05
"""Time between two attempts to make room, while other files are being written or were just used."""
PART, LOCKS, ROOM = ".part", "locks", "room"
NAME = re.compile("[0-9a-f]{16}-")
"""Beginning of the names of cached files. Other files in the folder aren't counted, and never removed."""


class CacheFolder:
    """A folder of complete files by name, of at most ``limit`` bytes together, shared by the processes of a machine.

    - A file gets its name when it is complete. Until then ``.part`` follows its name, and its writer holds its lock. Locks are
      the kernel's (``flock``) and end with their process, so a ``.part`` file whose lock is free was left by a killed writer.
    - Room is taken before the first byte is written, so files that are being written count in full. One lock guards counting,
      adding and removing files.
    - The least recently used files are removed first. A file that is open in a process stays readable there until it is closed.
    - A file that others may write, or a link in its place, counts as missing.

    The folder must be on a local disk, because locks and times of use belong to one machine. All methods may raise OSError.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        """Stores the arguments; ``directory`` is created at the first use."""
        self.directory, self.limit = directory, limit

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Holds the lock of a name, for which other processes and threads wait."""
        descriptor = self._lock_file(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            release(descriptor)

    def open(self, name: str, size: int) -> int | None:
        """Returns a descriptor of the file if it is there and has that size, and marks it as used; otherwise None."""
        descriptor = open_own(self.directory / name)
        if descriptor is None:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def add(self, name: str, size: int, write: Callable[[int], None]) -> int:
        """Makes a file of ``size`` bytes, and waits for room if necessary. The caller holds the name's lock.

        Args:
            name: of the file.
            size: of the file in bytes, at most the limit; the room is allocated on the disk.
            write: fills the descriptor that it is given, from position 0 on; if it raises an error, there will be no file.

        Returns:
            The descriptor. The file may be evicted before anyone else has opened it.
        """
        assert size <= self.limit, "it would wait for room for ever"
        part = self.directory / (name + PART)
        descriptor = self._take_room(part, size)
        try:
            if size:
                os.posix_fallocate(descriptor, 0, size)
            write(descriptor)
            # First to the disk, then the name: a power failure could otherwise leave a named file of zeros.
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
        """Removes a file if it is there."""
        with self.locked(ROOM):
            (self.directory / name).unlink(missing_ok=True)

    def _take_room(self, part: Path, size: int) -> int:
        """Waits until ``size`` bytes fit, creates a file of that size, and returns its descriptor."""
        while True:
            with self.locked(ROOM):
                part.unlink(missing_ok=True)
                if self._make_room(size):
                    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                    os.truncate(descriptor, size)
                    return descriptor
            time.sleep(WAIT_S)

    def _make_room(self, size: int) -> bool:
        """Evicts files, and returns whether ``size`` bytes fit now. The caller holds the lock ``ROOM``."""
        entries = [entry for entry in os.scandir(self.directory) if NAME.match(entry.name)]
        files = [(entry.name, entry.stat()) for entry in entries if entry.is_file(follow_symlinks=False)]
        excess = sum(status.st_size for _, status in files) + size - self.limit
        for name, status in sorted(files, key=lambda file: file[1].st_mtime):
            if excess <= 0:
                break
            # A time in the future means that the clock was set back.
            used_just_now = 0 <= time.time() - status.st_mtime < RECENTLY_USED_S
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
    """Returns a descriptor of an ordinary file that only this user may write; None if there is no such file."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
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
    """Releases a lock. If the file were only closed, processes forked meanwhile by another thread would keep the lock."""
    fcntl.flock(lock_file, fcntl.LOCK_UN)
    os.close(lock_file)


INDEX_AGE_S = 600.0
"""An index is fetched again when its copy is older. So one fetch serves all ranks of a start, and later starts see changes."""


class ShardCache:
    """Fetches shards and indexes, each once per machine, into a :class:`CacheFolder` that the machine's processes share.

    Args:
        directory: of the cache; None is ``svite_scale-UID`` in the system's folder for temporary files.
        limit: of the cache, in bytes.
        attempts: to fetch a file.
        backoff_s: mean wait after the first attempt, in seconds; it doubles from attempt to attempt.
    """

    def __init__(self, directory: Path | None, limit: int, attempts: int, backoff_s: float = 1.0) -> None:
        self._is_ours = directory is None
        self._folder = CacheFolder(directory or Path(tempfile.gettempdir()) / f"svite_scale-{os.getuid()}", limit)
        self._attempts, self._backoff_s = attempts, backoff_s

    @classmethod
    def from_options(cls, options: DataConfig) -> ShardCache:
        """Returns the cache that the options name."""
        directory = None if options.cache_dir is None else Path(options.cache_dir).expanduser()
        return cls(directory, round(options.cache_gb * 1e9), options.fetch_attempts)

    def shard(self, url: str, size: int, digest: str) -> RemoteShard:
        """Returns a shard of this cache; nothing is fetched yet.

        Args:
            url: of the shard.
            size: of the shard in bytes, from its index.
            digest: SHA-256 in hexadecimal, from its index.

        Raises:
            DataError: the shard is larger than the cache.
        """
        limit = self._folder.limit
        if size > limit:
            raise DataError(
                f"data.cache_gb = {limit / 1e9:g} is smaller than one shard ({url} has {size / 1e9:g} GB); raise it"
            )
        return RemoteShard(url, size, digest, self)

    def open_shard(self, url: str, size: int, digest: str) -> int:
        """Returns a descriptor of the shard's bytes, fetched if necessary; the caller closes it.

        The bytes stay readable through the descriptor after the file is evicted.

        Raises:
            DataError: the shard can't be fetched, or doesn't match its index.
        """
        # The name depends on size and digest, so a replaced shard is another file.
        name = name_prefix(f"{size} {digest} {url}") + readable_name(url)
        with self._folder_errors():
            descriptor = self._folder.open(name, size)
            if descriptor is not None:
                return descriptor
            with self._folder.locked(name):
                # Another process has probably fetched the shard, if this one waited for the lock.
                descriptor = self._folder.open(name, size)
                return self._fetch_shard(name, url, size, digest) if descriptor is None else descriptor

    def index_text(self, url: str) -> str:
        """Returns the index of the shard at ``url``: valid JSON, otherwise unchecked.

        Raises:
            DataError: the index can't be fetched, is no JSON, or is larger than the cache.
        """
        name = index_name(url)
        with self._folder_errors(), self._folder.locked(name):
            content = read_if_young(self._folder.directory / name)
            return (self._fetch_index(name, index_url(url)) if content is None else content).decode()

    def forget_index(self, url: str) -> None:
        """Removes the index of the shard at ``url`` because it doesn't match the shard; the next start fetches it again."""
        self._folder.remove(index_name(url))

    def _fetch_shard(self, name: str, url: str, size: int, digest: str) -> int:
        remedy = "check the network or raise data.fetch_attempts; if the shard was replaced, replace its index too"

        def write(descriptor: int) -> None:
            fetch(url, lambda chunks: write_checked(descriptor, chunks, size, digest), self._attempts, self._backoff_s, remedy)

        try:
            return self._folder.add(name, size, write)
        except DataError:
            self.forget_index(url)
            raise

    def _fetch_index(self, name: str, source: str) -> bytes:
        remedy = (
            "check the URL; a shard without an index gets one where it is stored (python launch/make_shards.py --index), "
            "to be put beside it"
        )
        content = fetch(source, read_json, self._attempts, self._backoff_s, remedy)
        if len(content) > self._folder.limit:
            limit = self._folder.limit / 1e9
            raise DataError(f"data.cache_gb = {limit:g} is smaller than one index ({source}); raise it")
        os.close(self._folder.add(name, len(content), lambda descriptor: write_all(descriptor, content, 0)))
        return content

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        """Creates and checks the folder, and turns its OSErrors into a DataError that names the field."""
        directory = self._folder.directory
        field = f"data.cache_dir = {'null' if self._is_ours else repr(str(directory))}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_ours and directory.lstat().st_uid != os.getuid():
                raise DataError(f"{field}: {directory} is another user's; name a folder of yours")
            mode = directory.stat().st_mode
            # In a folder with the sticky bit others can't replace files, and ``open_own`` ignores files of others.
            if mode & 0o022 and not mode & stat.S_ISVTX:
                raise DataError(f"{field}: {directory} can be written by others; run chmod go-w {directory}, or name another")
            yield
        except OSError as error:
            raise DataError(f"{field}: {directory} can't be used ({error}); name a writable folder with enough room") from error


@dataclass(frozen=True)
class RemoteShard:
    """A shard at a URL, with size and SHA-256 from its index."""

    url: str
    size: int
    digest: str
    cache: ShardCache

    def __str__(self) -> str:
        return self.url

    def open(self) -> int:
        """Returns a descriptor of the shard's bytes; see :meth:`ShardCache.open_shard`."""
        return self.cache.open_shard(self.url, self.size, self.digest)


def name_prefix(text: str) -> str:
    """Returns the beginning of a file's name in the cache, by which it differs from all others."""
    return f"{sha256(text.encode()).hexdigest()[:16]}-"


def index_name(url: str) -> str:
    """Returns the name of a shard's index in the cache."""
    return name_prefix(index_url(url)) + readable_name(url) + INDEX_SUFFIX


def read_json(chunks: Iterator[bytes]) -> bytes:
    """Returns all bytes of a JSON text.

    Raises:
        FetchError: the bytes are no JSON, for example because the end is missing.
    """
    content = b"".join(chunks)
    try:
        json.loads(content.decode())
    except ValueError as error:
        raise FetchError(f"it isn't JSON ({error})") from error
    return content


def read_if_young(index: Path) -> bytes | None:
    """Returns the cached copy of an index; None if there is none, or it is older than ``INDEX_AGE_S``."""
    descriptor = open_own(index)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:
        is_young = 0 <= time.time() - os.fstat(descriptor).st_mtime < INDEX_AGE_S
        return file.read() if is_young else None


def write_all(descriptor: int, content: bytes, position: int) -> None:
    """Writes all of ``content`` at ``position``; the kernel may take it in several parts."""
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def write_checked(descriptor: int, chunks: Iterator[bytes], size: int, digest: str) -> None:
    """Writes a shard from position 0 on, and checks it.

    Raises:
        FetchError: size or SHA-256 are wrong.
    """
    position, hashed = 0, sha256()
    for chunk in chunks:
        if position + len(chunk) > size:
            raise FetchError(f"it has more than the {size} bytes that its index states", is_final=True)
        write_all(descriptor, chunk, position)
        hashed.update(chunk)
        position += len(chunk)
    if position < size:
        raise FetchError(f"it ended after {position} of the {size} bytes that its index states")
    if hashed.hexdigest() != digest:
        raise FetchError("its SHA-256 isn't the one that its index states")
