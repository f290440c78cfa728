"""The index of a tar shard: where each image lies, and its label; kept in a small JSON sidecar next to the shard."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svite_scale.config import DataConfig
from svite_scale.data.cache import RemoteShard, ShardCache
from svite_scale.data.files import replacing
from svite_scale.data.patterns import find_shards, find_urls
from svite_scale.data.scan import TarSample, scan_tar
from svite_scale.data.urls import index_url, is_remote
from svite_scale.errors import DataError

FORMAT = 1
"""Version of the sidecar's layout."""
FETCHES = 16
"""Indexes that are fetched at a time."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What random access to one shard needs.

    Columns are numpy arrays, so that an index of millions of samples stays compact and is shared with forked workers.
    """

    path: Path | RemoteShard
    """The tar file."""
    size: int
    """Its length in bytes, by which a stale index is recognised."""
    offsets: npt.NDArray[np.int64]
    """``[count]``: first byte of each image."""
    lengths: npt.NDArray[np.int64]
    """``[count]``: bytes of each image."""
    labels: npt.NDArray[np.int64]
    """``[count]``"""
    keys: npt.NDArray[np.bytes_]
    """``[count]``: webdataset keys, in UTF-8."""

    @property
    def count(self) -> int:
        """Samples in the shard."""
        return len(self.offsets)

    def key(self, position: int) -> str:
        """Key of the sample at ``position`` of the shard."""
        return bytes(self.keys[position]).decode()


def sidecar_path(shard: Path) -> Path:
    """Where the index of ``shard`` is kept."""
    return shard.with_name(shard.name + ".index.json")


def build_index(shard: Path) -> ShardIndex:
    """Builds the index by reading the headers of the tar.

    Raises:
        DataError: the tar is damaged, or a sample has no image or no label.
    """
    return index_of(shard, shard.stat().st_size, scan_tar(shard))


def index_of(shard: Path, size: int, samples: list[TarSample]) -> ShardIndex:
    return ShardIndex(
        path=shard,
        size=size,
        offsets=np.array([sample.offset for sample in samples], dtype=np.int64),
        lengths=np.array([sample.length for sample in samples], dtype=np.int64),
        labels=np.array([sample.label for sample in samples], dtype=np.int64),
        keys=np.array([sample.key.encode() for sample in samples], dtype=np.bytes_),
    )


def save_index(index: ShardIndex) -> Path:
    """Writes the sidecar in one step and returns its path."""
    record = {
        "format": FORMAT,
        "size": index.size,
        "keys": [index.key(position) for position in range(index.count)],
        "offsets": index.offsets.tolist(),
        "lengths": index.lengths.tolist(),
        "labels": index.labels.tolist(),
    }
    assert isinstance(index.path, Path), "indexes are written where the shards are"
    path = sidecar_path(index.path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    return path


def load_index(shard: Path) -> ShardIndex:
    """Reads the sidecar of ``shard``.

    Raises:
        DataError: it is missing, unreadable, or was written for another version of the tar.
    """
    path = sidecar_path(shard)
    remedy = f"run: python launch/make_shards.py --index '{shard}'"
    if not path.exists():
        raise DataError(f"{shard} has no index ({path.name}); {remedy}")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a readable index ({error!r}); delete it and {remedy}") from error
    index = parse_index(text, shard, str(path), f"delete it and {remedy}")
    size = shard.stat().st_size
    if size != index.size:
        raise DataError(f"{path} is stale: it describes a tar of {index.size} bytes, {shard.name} has {size}; {remedy}")
    return index


def parse_index(text: str, shard: Path, source: str, remedy: str) -> ShardIndex:
    """The index that a sidecar's text describes.

    Args:
        text: of the sidecar.
        shard: which the index is of.
        source: where the text is from, for the error.
        remedy: for the error.

    Raises:
        DataError: the text is no index, or has another format.
    """
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise DataError(f"{source} has format {record['format']!r}, this version reads {FORMAT}; {remedy}")
        columns = zip(record["keys"], record["offsets"], record["lengths"], record["labels"], strict=True)
        return index_of(shard, record["size"], [TarSample(*row) for row in columns])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source} is not a readable index ({error!r}); {remedy}") from error


def load_indexes(pattern: str, field: str = "pattern", cache: ShardCache | None = None) -> list[ShardIndex]:
    """The indexes of all shards that ``pattern`` names, sorted by path or URL; the same list on every rank.

    Args:
        pattern: brace pattern, glob, or folder; or a brace pattern of URLs.
        field: what the pattern is called where the user wrote it, for example ``data.train``.
        cache: keeps what is fetched; None is the one of the config's defaults.

    Raises:
        DataError: the pattern is empty or matches nothing, or an index is missing, unreadable or stale.
    """
    if not is_remote(pattern):
        return [load_index(shard) for shard in find_shards(pattern, field)]
    used = cache or ShardCache.of(DataConfig())
    pool = ThreadPoolExecutor(FETCHES)
    try:
        return list(pool.map(lambda url: load_remote_index(url, used), find_urls(pattern, field)))
    finally:
        # After an error the others aren't waited for.
        pool.shutdown(cancel_futures=True)


def load_remote_index(url: str, cache: ShardCache) -> ShardIndex:
    """The index of the shard at ``url``, whose bytes will come through ``cache``.

    Raises:
        DataError: the index can't be fetched or read, or the cache can't hold the shard.
    """
    remedy = "write it again where the shard is stored (python launch/make_shards.py --index)"
    try:
        index = parse_index(cache.index_text(url), Path(url), index_url(url), remedy)
    except DataError:
        cache.forget_index(url)
        raise
    return replace(index, path=cache.shard(url, index.size, None))


def write_missing_indexes(pattern: str, field: str = "pattern") -> list[Path]:
    """Indexes the shards that have no index, or a stale or unreadable one.

    Returns:
        The sidecars written.

    Raises:
        DataError: the pattern matches nothing, or a shard is damaged.
    """
    return [save_index(build_index(shard)) for shard in find_shards(pattern, field) if not is_indexed(shard)]


def is_indexed(shard: Path) -> bool:
    """Whether ``shard`` has an index that can be used."""
    try:
        load_index(shard)
    except DataError:
        return False
    return True
