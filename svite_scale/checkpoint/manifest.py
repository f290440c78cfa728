"""The manifest of a complete checkpoint: size and SHA-256 of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from svite_scale.runtime.durable import sync, write_durably

MANIFEST = "manifest.json"
PIECE = 2**20
"""Number of bytes read at a time."""


@dataclass(frozen=True)
class FileDigest:
    """Size and checksum of a file.

    Attributes:
        size: bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str


def digest(path: Path) -> FileDigest:
    """Returns the size and checksum of a file, which it reads."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            sha256.update(piece)
            size += len(piece)
    return FileDigest(size, sha256.hexdigest())


def write_manifest(directory: Path, files: Mapping[str, FileDigest]) -> None:
    """Writes the manifest of a checkpoint whose other files are all written, and waits until the disk has it.

    Args:
        directory: of the checkpoint.
        files: by name in it.
    """
    entries = {name: asdict(files[name]) for name in sorted(files)}
    write_durably(directory / MANIFEST, json.dumps({"files": entries}, indent=2) + "\n")
    sync(directory)


def problem_of(directory: Path, to_read: slice = slice(None)) -> str | None:
    """Returns what is wrong with a checkpoint, in words; None if it is complete and undamaged.

    Args:
        directory: of the checkpoint.
        to_read: which files, in alphabetical order, are read to compare checksums. Sizes are compared for all files.
    """
    try:
        return _mismatch(directory, to_read)
    except OSError as error:
        return str(error)


def _mismatch(directory: Path, to_read: slice) -> str | None:
    if not (directory / MANIFEST).exists():
        return f"it has no {MANIFEST}"
    try:
        entries = json.loads((directory / MANIFEST).read_text())["files"]
        files = {name: FileDigest(**entry) for name, entry in sorted(entries.items())}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    for name, expected in files.items():
        if Path(name).name != name:
            return f"its {MANIFEST} names {name!r}, which is no file of this directory"
        path = directory / name
        if not path.exists():
            return f"{name} is missing"
        if not path.is_file():
            return f"{name} is no file"
        if path.stat().st_size != expected.size:
            return f"{name} has {path.stat().st_size} bytes instead of {expected.size}"
    for name in list(files)[to_read]:
        if digest(directory / name) != files[name]:
            return f"the checksum of {name} is wrong"
    return None
