"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden temporary name beside ``path``; what was written there becomes ``path`` when the block succeeds.

    A reader, or a run that was killed, never sees a part of the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path, start: str) -> None:
    """Removes what killed processes left of files whose names begin with ``start``; none may be writing them."""
    for path in directory.iterdir():
        if path.name.startswith(f".{start}") and path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; reads all of it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
