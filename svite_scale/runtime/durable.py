"""Files and folders that are on the disk, and not only in its cache, when they are said to be."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Writes a file that is on the disk when this returns."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """The same for a file that may be there: whatever happens meanwhile, it has all of its old or all of its new content."""
    new = path.with_name(f"{path.name}.new")
    write_durably(new, text)
    os.replace(new, path)
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Makes a directory, and those above it that are missing."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        sync(directory.parent)


def sync(directory: Path) -> None:
    """Returns when a directory's names are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
