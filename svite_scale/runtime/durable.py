"""Writing files and directories so that the disk has them, and not only the system's cache."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Writes a file, and returns when the disk has it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Replaces a file's content: whatever happens meanwhile, the file has all of the old content or all of the new."""
    new = path.with_name(f"{path.name}.new")
    write_durably(new, text)
    os.replace(new, path)
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Makes a directory, with missing parents, and returns when the disk has them."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        sync(directory.parent)


def sync(directory: Path) -> None:
    """Returns when the disk has the names in a directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
