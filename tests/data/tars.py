"""Tars as other tools write them, and damage to them."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

BLOCK = 512


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT, mode: str = "w") -> Path:
    """A tar of these members; ``mode`` as ``w:gz`` compresses it."""
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def overwrite(path: Path, start: int, content: bytes) -> None:
    """Overwrites bytes from ``start`` on with ``content``; the size stays."""
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)
