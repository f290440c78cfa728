"""Files that appear complete or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHUNK = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden temporary path beside ``path``, and renames the file there to ``path`` when the block succeeds.

    So neither a reader nor a kill ever finds an incomplete file at ``path``. The file isn't synced to the disk, which would be
    slow for shards; their indexes have checksums.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # in a folder of somebody else's it may be a link, which would be followed
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Removes temporary files that killed processes left beside these paths. No process may be writing them now."""
    names = {path.name: path.parent for path in paths}
    for folder in set(names.values()):
        for temporary in folder.glob(".*.tmp"):
            if temporary.name[1:].rsplit(".", 2)[0] in names:
                temporary.unlink(missing_ok=True)


def open_regular(path: Path) -> IO[bytes]:
    """Opens an ordinary file for reading. (A named pipe would keep its reader waiting for ever.)

    Raises:
        OSError: the file can't be opened, or is a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is no ordinary file")
    return open(path, "rb")


def read_regular(path: Path) -> bytes:
    """Returns the content of an ordinary file.

    Raises:
        OSError: see :func:`open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal; reads all of it."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
