"""Patterns of shards: the shards that a pattern names, and their indexes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from svite_scale.data.format.index import ShardIndex, find_damage, is_newer, load_index, parse_index, sidecar_path
from svite_scale.data.format.info import INFO_NAME, listed_shards
from svite_scale.data.options import DataConfig
from svite_scale.data.remote.cache import ShardCache
from svite_scale.data.remote.fetch import COMMANDS, PIPE, index_url, is_remote
from svite_scale.errors import DataError

COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)$")
FETCHES = 16
"""Indexes that are fetched at the same time."""
DEFAULTS = DataConfig()

logger = logging.getLogger(__name__)


def find_urls(pattern: str, field: str) -> list[str]:
    """Returns the URLs that a remote brace pattern names, sorted, each once.

    Args:
        pattern: for example ``https://host/train-{000000..000009}.tar`` or ``pipe:ssh host cat /data/train-{00..09}.tar``.
        field: name of the option that holds the pattern, for the error.

    Raises:
        DataError: the pattern is malformed, or has a glob.
    """
    urls = expand_braces(pattern, field)
    if "*" in pattern and not pattern.startswith(PIPE):
        raise DataError(
            f"{field} = {pattern!r}: URLs can't be listed by a glob; write braces, for example train-{{00..09}}.tar"
        )
    return sorted(set(urls))


def find_shards(pattern: str, field: str) -> list[Path]:
    """Returns the tar shards that a brace pattern, a glob, or a folder names, sorted, each once.

    Args:
        pattern: for example ``shards/train-{000000..000009}.tar``, ``shards/train-*.tar`` or ``shards``.
        field: name of the option that holds the pattern, for the error.

    Raises:
        DataError: the pattern is empty or malformed, a part of it matches nothing or not all shards that ``_info.json`` lists,
            or a folder has compressed shards too.
    """
    if not pattern:
        raise DataError(f"{field} is empty; give the brace pattern, glob or folder of tar shards")
    if is_remote(pattern):
        raise DataError(f"{field} = {pattern!r} is remote; do this where the shards are stored, with their paths")
    if "://" in pattern:
        known = ", ".join(f"{scheme}://" for scheme in COMMANDS)
        raise DataError(f"{field} = {pattern!r}: such URLs aren't known; use {known}, {PIPE}COMMAND or a path")
    return sorted({shard for part in expand_braces(pattern, field) for shard in match_shards(part, pattern, field)})


def expand_braces(pattern: str, field: str) -> list[str]:
    """Returns the patterns that the braces of a pattern stand for."""
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{field} = {pattern!r} has unbalanced braces; write for example train-{{00..09}}.tar") from error


def match_shards(part: str, pattern: str, field: str) -> list[Path]:
    """Returns the shards of one brace-expanded part of ``pattern``: a folder's ``*.tar``, or the files of a path or glob."""
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
            f"{field} = {pattern!r}: {missing[0]} is missing, which {INFO_NAME} lists; restore it, or write the shards again"
        )
    packed = [file for file in folder.iterdir() if COMPRESSED.search(file.name)] if path.is_dir() else []
    if packed:
        raise DataError(f"{field} = {pattern!r}: {min(packed)} is compressed; unpack it (gunzip), or give a glob without it")
    return found


def load_indexes(pattern: str, field: str = "pattern", options: DataConfig = DEFAULTS) -> list[ShardIndex]:
    """Returns the indexes of all shards that ``pattern`` names, sorted by path or URL; the same list on every rank.

    Warns if a tar is newer than its index.

    Args:
        pattern: brace pattern, glob, or folder; or a brace pattern of URLs.
        field: name of the option that holds the pattern, for example ``data.train``.
        options: of the data, for the cache of remote shards.

    Raises:
        DataError: the pattern is empty or matches nothing, or an index is missing, unreadable or stale.
    """
    if not is_remote(pattern):
        shards = find_shards(pattern, field)
        indexes = [load_index(shard) for shard in shards]
        warn_of_newer([shard for shard in shards if is_newer(shard, sidecar_path(shard))], pattern, field)
        return indexes
    cache = ShardCache.from_options(options)
    pool = ThreadPoolExecutor(FETCHES)
    try:
        return list(pool.map(lambda url: load_remote_index(url, cache), find_urls(pattern, field)))
    finally:
        # After an error, don't wait for the others.
        pool.shutdown(cancel_futures=True)


def load_remote_index(url: str, cache: ShardCache) -> ShardIndex:
    """Returns the index of the shard at ``url``, whose bytes will come through ``cache``.

    Raises:
        DataError: the index can't be fetched or read, or the cache can't hold the shard.
    """
    remedy = "write it again where the shard is stored (python launch/make_shards.py --index)"
    try:
        index = parse_index(cache.index_text(url), Path(url), index_url(url), remedy)
    except DataError:
        cache.forget_index(url)
        raise
    return replace(index, path=cache.shard(url, index.size, index.sha256))


def warn_of_newer(newer: Sequence[Path], pattern: str, field: str) -> None:
    """Warns of tars that are newer than their indexes, if there are any."""
    if newer:
        logger.warning(
            "%s = %r: %d shards are newer than their indexes (%s is the first), so images and labels may differ from them; to "
            "compare them, and index again what differs, run: python launch/make_shards.py --index '%s'",
            *(field, pattern, len(newer), newer[0].name, pattern),
        )


def check_contents(indexes: Sequence[ShardIndex], rank: int, world_size: int) -> None:
    """Compares every ``world_size``-th shard, from number ``rank`` on, with the checksum in its index; reads all of it.

    This isn't a collective. A rank that finds damage raises an error while the others continue, and the launcher reports it, as
    with samples that can't be read. Remote shards are skipped, because they are compared when they are fetched.

    Raises:
        DataError: names the first shard that differs.
    """
    for index in indexes[rank::world_size]:
        problem = find_damage(index.path) if isinstance(index.path, Path) else ""
        if problem:
            raise DataError(problem)


def largest_label(indexes: Sequence[ShardIndex]) -> tuple[int, str]:
    """Returns the largest label, and a description of the first sample that has it; -1 without samples."""
    largest = max((int(index.labels.max()) for index in indexes if index.count), default=-1)
    for index in indexes:
        positions = np.flatnonzero(index.labels == largest)
        if len(positions):
            return largest, f"sample {index.key(int(positions[0]))!r} of {index.path}"
    return largest, "no sample"
