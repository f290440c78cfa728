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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from svite_scale.config.schema import DataConfig
from svite_scale.data.remote.fetch import INDEX_SUFFIX, FetchError, fetch, index_url, readable_name
from svite_scale.errors import ConfigError, DataError

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


INDEX_AGE_S = 600.0
"""Indexes are fetched again when their copy is older: one fetch serves all ranks of a start, and later starts see changes."""


class ShardCache:
    """Fetches what a machine's processes ask for, each file once, and keeps it in a :class:`CacheFolder` that they share.

    Args:
        directory: None is ``svite_scale-UID`` in the system's folder for temporary files.
        limit: bytes.
        attempts: tries of a fetch.
        backoff_s: mean wait after the first try, in seconds; it doubles from try to try.
    """

    def __init__(self, directory: Path | None, limit: int, attempts: int, backoff_s: float = 1.0) -> None:
        self._is_ours = directory is None
        self._folder = CacheFolder(directory or Path(tempfile.gettempdir()) / f"svite_scale-{os.getuid()}", limit)
        self._attempts, self._backoff_s = attempts, backoff_s

    @classmethod
    def of(cls, config: DataConfig) -> ShardCache:
        """The cache that a config names."""
        directory = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
        return cls(directory, round(config.cache_gb * 1e9), config.fetch_attempts)

    def shard(self, url: str, size: int, digest: str) -> RemoteShard:
        """A shard of this cache; nothing is fetched yet.

        Args:
            url: of the shard.
            size: bytes, as its index tells.
            digest: SHA-256 in hexadecimal, as its index tells.

        Raises:
            DataError: the cache can't hold it.
        """
        limit = self._folder.limit
        if size > limit:
            raise DataError(
                f"data.cache_gb = {limit / 1e9:g} is smaller than one shard ({url} has {size / 1e9:g} GB); raise it"
            )
        return RemoteShard(url, size, digest, self)

    def open_shard(self, url: str, size: int, digest: str) -> int:
        """A descriptor of the shard's bytes, for the caller to close. They stay readable through it, evicted or not.

        Raises:
            DataError: the shard can't be fetched, or isn't what its index tells.
        """
        # What the index tells is in the name, so a replaced shard is another file.
        name = hashed(f"{size} {digest} {url}") + readable_name(url)
        with self._folder_errors():
            descriptor = self._folder.open(name, size)
            if descriptor is not None:
                return descriptor
            with self._folder.locked(name):
                # Whoever had the lock before has probably fetched it.
                descriptor = self._folder.open(name, size)
                return self._fetch_shard(name, url, size, digest) if descriptor is None else descriptor

    def index_text(self, url: str) -> str:
        """The index sidecar of a shard, by the shard's URL: JSON, otherwise unchecked.

        Raises:
            DataError: it can't be fetched, or is no JSON, or the cache can't hold it.
        """
        name = index_name(url)
        with self._folder_errors(), self._folder.locked(name):
            content = young_content(self._folder.directory / name)
            return (self._fetch_index(name, index_url(url)) if content is None else content).decode()

    def forget_index(self, url: str) -> None:
        """Lets the next start fetch the index of the shard at ``url``, because something doesn't fit."""
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
        content = fetch(source, whole_json, self._attempts, self._backoff_s, remedy)
        if len(content) > self._folder.limit:
            limit = self._folder.limit / 1e9
            raise DataError(f"data.cache_gb = {limit:g} is smaller than one index ({source}); raise it")
        os.close(self._folder.add(name, len(content), lambda descriptor: write_all(descriptor, content, 0)))
        return content

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        """Checks the folder, and turns its errors into one that names the field."""
        directory = self._folder.directory
        field = f"data.cache_dir = {'null' if self._is_ours else repr(str(directory))}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_ours and directory.lstat().st_uid != os.getuid():
                raise DataError(f"{field}: {directory} is another user's; name a folder of yours")
            mode = directory.stat().st_mode
            # Where only owners may rename, what others write there isn't taken for a file of this user's.
            if mode & 0o022 and not mode & stat.S_ISVTX:
                raise DataError(f"{field}: {directory} can be written by others; run chmod go-w {directory}, or name another")
            yield
        except OSError as error:
            raise DataError(f"{field}: {directory} can't be used ({error}); name a writable folder with enough room") from error


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL, as its index describes it."""

    url: str
    size: int
    digest: str
    cache: ShardCache

    def __str__(self) -> str:
        return self.url

    def open(self) -> int:
        """A descriptor of the shard's bytes, fetched if need be; see :meth:`ShardCache.open_shard`."""
        return self.cache.open_shard(self.url, self.size, self.digest)


def hashed(text: str) -> str:
    """The beginning of a file's name in the cache, which tells it from all others."""
    return f"{sha256(text.encode()).hexdigest()[:16]}-"


def index_name(url: str) -> str:
    """What the index of a shard is called in the cache."""
    return hashed(index_url(url)) + readable_name(url) + INDEX_SUFFIX


def whole_json(chunks: Iterator[bytes]) -> bytes:
    """All bytes of a JSON text.

    Raises:
        FetchError: it isn't one, as when its end is missing.
    """
    content = b"".join(chunks)
    try:
        json.loads(content.decode())
    except ValueError as error:
        raise FetchError(f"it is no JSON ({error})") from error
    return content


def young_content(index: Path) -> bytes | None:
    """The copy of an index, where there is one that needn't be fetched again."""
    descriptor = open_own(index)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:
        is_young = 0 <= time.time() - os.fstat(descriptor).st_mtime < INDEX_AGE_S
        return file.read() if is_young else None


def window_size(config: DataConfig, sizes: Sequence[int], windows: int = 1) -> int:
    """Most bytes that the remote shards of so many windows take, of shards of ``sizes`` bytes."""
    return sum(sorted(sizes)[-windows * config.shuffle_shards :])


def check_window(config: DataConfig, sizes: Sequence[int]) -> None:
    """Requires room for the remote shards that are read at a time, which would else be fetched again and again.

    Args:
        config: of the data.
        sizes: bytes of the remote shards to train on.

    Raises:
        ConfigError: the largest ``shuffle_shards`` of them don't fit into the cache.
    """
    needed = window_size(config, sizes)
    if needed > config.cache_gb * 1e9:
        problem = f"doesn't hold the data.shuffle_shards = {config.shuffle_shards} shards that are read at a time"
        raise ConfigError("data.cache_gb", config.cache_gb, problem, f"use at least {needed / 1e9:.3g}, or lower the other")


def write_all(descriptor: int, content: bytes, position: int) -> None:
    """Writes ``content`` at ``position``; the kernel may take it in parts."""
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def write_checked(descriptor: int, chunks: Iterator[bytes], size: int, digest: str) -> None:
    """Writes a shard from position 0 on.

    Raises:
        FetchError: it hasn't the size or the SHA-256 that it should have.
    """
    position, hashed = 0, sha256()
    for chunk in chunks:
        if position + len(chunk) > size:
            raise FetchError(f"it has more than the {size} bytes that its index tells", is_final=True)
        write_all(descriptor, chunk, position)
        hashed.update(chunk)
        position += len(chunk)
    if position < size:
        raise FetchError(f"it ended after {position} of the {size} bytes that its index tells")
    if hashed.hexdigest() != digest:
        raise FetchError("its SHA-256 isn't the one that its index tells")
