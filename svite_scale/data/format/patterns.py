"""From what a config says to the shards it means."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from svite_scale.data.format.info import NAME as INFO
from svite_scale.data.format.info import listed_shards
from svite_scale.data.remote.urls import COMMANDS, PIPE, is_remote
from svite_scale.errors import DataError

COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)$")


def find_urls(pattern: str, field: str) -> list[str]:
    """The URLs that a remote brace pattern names, sorted and each once.

    Args:
        pattern: for example ``https://host/train-{000000..000009}.tar`` or ``pipe:ssh host cat /data/train-{00..09}.tar``.
        field: what the pattern is called where the user wrote it, for the error.

    Raises:
        DataError: the pattern is malformed, or has a glob.
    """
    urls = expand(pattern, field)
    if "*" in pattern and not pattern.startswith(PIPE):
        raise DataError(
            f"{field} = {pattern!r}: URLs can't be listed by a glob; write braces, for example train-{{00..09}}.tar"
        )
    return sorted(set(urls))


def find_shards(pattern: str, field: str) -> list[Path]:
    """The tar shards that a brace pattern, a glob, or a folder names, sorted and each once.

    Args:
        pattern: for example ``shards/train-{000000..000009}.tar``, ``shards/train-*.tar`` or ``shards``.
        field: what the pattern is called where the user wrote it, for the error.

    Raises:
        DataError: the pattern is empty or malformed, a part of it matches nothing or not all that ``_info.json`` lists, or a
            folder has compressed shards too.
    """
    if not pattern:
        raise DataError(f"{field} is empty; give the brace pattern, glob or folder of tar shards")
    if is_remote(pattern):
        raise DataError(f"{field} = {pattern!r} is remote; do this where the shards are stored, with their paths")
    if "://" in pattern:
        known = ", ".join(f"{scheme}://" for scheme in COMMANDS)
        raise DataError(f"{field} = {pattern!r}: such URLs aren't known; use {known}, {PIPE}COMMAND or a path")
    return sorted({shard for part in expand(pattern, field) for shard in matches(part, pattern, field)})


def expand(pattern: str, field: str) -> list[str]:
    """A pattern with its braces expanded."""
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{field} = {pattern!r} has unbalanced braces; write for example train-{{00..09}}.tar") from error


def matches(part: str, pattern: str, field: str) -> list[Path]:
    """The shards of one brace-expanded part of ``pattern``: a folder's ``*.tar``, or the files that a path or glob names."""
    path = Path(part)
    if path.is_file():
        return [path]
    folder, name = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
    found = list(path.glob(name)) if path.is_dir() else [Path(match) for match in glob(part)]
    if not found:
        hint = " (in a glob, a [ of a name is written [[])" if "[" in part else ""
        raise DataError(
            f"{field} = {pattern!r}: no shard matches {part!r}{hint}; correct it, or write shards with launch/make_shards.py"
        )
    missing = [shard for shard in listed_shards(folder) if fnmatch(shard.name, name) and not shard.exists()]
    if missing:
        raise DataError(
            f"{field} = {pattern!r}: {missing[0]} is missing, which {INFO} lists; restore it, or write the shards again"
        )
    packed = [file for file in folder.iterdir() if COMPRESSED.search(file.name)] if path.is_dir() else []
    if packed:
        raise DataError(f"{field} = {pattern!r}: {min(packed)} is compressed; unpack it (gunzip), or give a glob without it")
    return found
