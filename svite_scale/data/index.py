"""The index of a tar shard: where each image lies, and its label; kept in a small JSON sidecar next to the shard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svite_scale.data.files import replacing
from svite_scale.data.patterns import find_shards
from svite_scale.data.scan import TarSample, scan_tar
from svite_scale.errors import DataError

FORMAT = 1
"""Version of the sidecar's layout."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What random access to one shard needs.

    Columns are numpy arrays, so that an index of millions of samples stays compact and is shared with forked workers.
    """

    path: Path
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
        record = json.loads(path.read_text())
        if record["format"] != FORMAT:
            raise DataError(f"{path} has format {record['format']!r}, this version reads {FORMAT}; delete it and {remedy}")
        columns = zip(record["keys"], record["offsets"], record["lengths"], record["labels"], strict=True)
        index = index_of(shard, record["size"], [TarSample(*row) for row in columns])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a readable index ({error!r}); delete it and {remedy}") from error
    size = shard.stat().st_size
    if size != index.size:
        raise DataError(f"{path} is stale: it describes a tar of {index.size} bytes, {shard.name} has {size}; {remedy}")
    return index


def load_indexes(pattern: str, field: str = "pattern") -> list[ShardIndex]:
    """The indexes of all shards that ``pattern`` names, sorted by path; the same list on every rank.

    Args:
        pattern: brace pattern, glob, or folder.
        field: what the pattern is called where the user wrote it, for example ``data.train``.

    Raises:
        DataError: the pattern is empty or matches nothing, or an index is missing, unreadable or stale.
    """
    return [load_index(shard) for shard in find_shards(pattern, field)]


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
