"""What a complete checkpoint consists of: size and SHA-256 of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from svite_scale.runtime.durable import sync, write_durably

MANIFEST = "manifest.json"
PIECE = 2**20
"""Bytes read at a time."""


@dataclass(frozen=True)
class FileDigest:
    """One file.

    Attributes:
        size: bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str


def digest(path: Path) -> FileDigest:
    """Reads a file."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            sha256.update(piece)
            size += len(piece)
    return FileDigest(size, sha256.hexdigest())


def write_manifest(directory: Path, files: Mapping[str, FileDigest]) -> None:
    """Makes a directory whose files are all there a complete checkpoint; both are then on the disk.

    Args:
        directory: of the checkpoint.
        files: by name in it.
    """
    entries = {name: asdict(files[name]) for name in sorted(files)}
    write_durably(directory / MANIFEST, json.dumps({"files": entries}, indent=2) + "\n")
    sync(directory)


def problem_of(directory: Path, share: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint; None where it is valid.

    Args:
        directory: of the checkpoint.
        share: which of its files, in alphabetical order, are read to compare their checksums; sizes are compared of all.
    """
    try:
        return _mismatch(directory, share)
    except OSError as error:
        return str(error)


def _mismatch(directory: Path, share: slice) -> str | None:
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
    for name in list(files)[share]:
        if digest(directory / name) != files[name]:
            return f"the checksum of {name} is wrong"
    return None
