"""The index of a tar shard: the place and the label of each image, in a small JSON sidecar beside the shard.

The sidecar's own modification time is that of its tar, in whole microseconds. (A time in its content would make the bytes
depend on more than the tar.) A copy that keeps times, rounded to seconds or not, keeps this equality. A copy that doesn't gives
the sidecar a time that isn't in whole microseconds, and then times prove nothing.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svite_scale.data.format.files import open_regular, replacing, sha256_of
from svite_scale.data.format.labels import LabelRule
from svite_scale.data.format.scan import scan_tar
from svite_scale.data.remote.cache import RemoteShard
from svite_scale.errors import DataError

FORMAT = 2
"""Version of the sidecar's layout."""
DAY_NS = 86_400 * 10**9


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The places, labels and keys of a shard's samples, for random access.

    Columns are numpy arrays, so that an index of millions of samples stays compact and is shared with forked workers: 16
    bytes per sample, and the packed keys.
    """

    path: Path | RemoteShard
    """The tar file."""
    size: int
    """Bytes of the tar, by which a stale index is recognised at once."""
    sha256: str
    """SHA-256 of the tar in hexadecimal, by which damage is recognised."""
    source_digest: str
    """Digest of the files that the shard was written from, by which its writer recognises it; empty for shards of others.
    The sidecar calls it ``plan``."""
    offsets: npt.NDArray[np.int64]
    """``[count]``: first byte of each image."""
    lengths: npt.NDArray[np.int32]
    """``[count]``: bytes of each image; 0 where the image is empty."""
    labels: npt.NDArray[np.int32]
    """``[count]``"""
    packed_keys: bytes
    """Keys, for messages only: compressed UTF-8, separated by zero bytes (other bytes by Python's ``surrogateescape``)."""

    @property
    def count(self) -> int:
        """The number of samples in the shard."""
        return len(self.offsets)

    @property
    def keys(self) -> list[str]:
        """The samples' keys, unpacked at each call."""
        return zlib.decompress(self.packed_keys).decode(errors="surrogateescape").split("\0") if self.count else []

    def key(self, position: int) -> str:
        """Returns the key of the sample at ``position`` in the shard."""
        return self.keys[position]


def sidecar_path(shard: Path) -> Path:
    """Returns the path of a shard's index."""
    return shard.with_name(shard.name + ".index.json")


def build_index(shard: Path, rule: LabelRule | None = None, source_digest: str = "") -> tuple[ShardIndex, Counter[str]]:
    """Builds an index by reading the whole tar, once for its headers and once for the checksum.

    Returns:
        The index, and the members that belong to no sample, counted by kind.

    Raises:
        DataError: the tar is damaged or compressed, a sample has no image or no label, or the tar changes meanwhile.
    """
    before = shard.stat()
    samples, left_out = scan_tar(shard, rule)
    index = make_index(shard, before.st_size, sha256_of(shard), source_digest, zip(*samples, strict=True))
    after = shard.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DataError(f"{shard} changes while it is read; index it when it is complete")
    return index, left_out


def make_index(shard: Path, size: int, sha256: str, source_digest: str, columns: Iterable[Sequence[Any]]) -> ShardIndex:
    """Makes an index of the columns keys, offsets, lengths and labels."""
    keys, offsets, lengths, labels = columns
    return ShardIndex(
        path=shard,
        size=size,
        sha256=sha256,
        source_digest=source_digest,
        offsets=np.array(offsets, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int32),
        labels=np.array(labels, dtype=np.int32),
        packed_keys=zlib.compress("\0".join(keys).encode(errors="surrogateescape"), level=1),
    )


def save_index(index: ShardIndex) -> Path:
    """Writes the sidecar, complete or not at all, with the tar's modification time, and returns its path."""
    record = {
        "format": FORMAT,
        "size": index.size,
        "sha256": index.sha256,
        "plan": index.source_digest,
        "keys": index.keys,
        "offsets": index.offsets.tolist(),
        "lengths": index.lengths.tolist(),
        "labels": index.labels.tolist(),
    }
    assert isinstance(index.path, Path), "indexes are written where the shards are"
    path = sidecar_path(index.path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
        copy_time(temporary, index.path)
    return path


def parse_index(text: str, shard: Path, source: str, remedy: str) -> ShardIndex:
    """Parses the text of a sidecar; reads no file.

    Args:
        text: of the sidecar.
        shard: path of the tar.
        source: path or URL of the text, for the error.
        remedy: for the error.

    Raises:
        DataError: the text is no index, or has another format.
    """
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise DataError(f"{source} has format {record['format']!r}, this version reads {FORMAT}; {remedy}")
        columns = [record[name] for name in ("keys", "offsets", "lengths", "labels")]
        require_list([record["size"]], int)
        for column, kind in zip(columns, (str, int, int, int), strict=True):
            require_list(column, kind)
        if len({len(column) for column in columns}) != 1:
            raise ValueError("columns of unequal length")
        if any("\0" in key for key in columns[0]):
            raise ValueError("a key with a zero byte")
        index = make_index(shard, record["size"], str(record["sha256"]), str(record["plan"]), columns)
        if min(int(column.min(initial=0)) for column in (index.offsets, index.lengths, index.labels)) < 0:
            raise ValueError("a negative number")
        if (index.offsets > index.size - index.lengths.astype(np.int64)).any():
            raise ValueError("an image beyond the tar's end")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{source} is not a readable index ({error!r}); {remedy}") from error
    return index


def require_list(column: object, kind: type) -> None:
    """Raises ValueError unless ``column`` is a list of ``kind`` only. (numpy would accept texts and fractions as numbers.)"""
    if not isinstance(column, list):
        raise ValueError(f"{str(column)[:40]!r} for a list")
    if set(map(type, column)) - {kind}:
        wrong = next(element for element in column if type(element) is not kind)
        raise ValueError(f"{str(wrong)[:40]!r} where only {kind.__name__} may stand")


def load_index(shard: Path) -> ShardIndex:
    """Reads the index of ``shard``, and compares its size with that of the tar.

    Raises:
        DataError: the index is missing or unreadable, or was written for a tar of another size.
    """
    path = sidecar_path(shard)
    remedy = index_command(shard)
    if not path.exists():
        raise DataError(f"{shard} has no index ({path.name}); {remedy}")
    try:
        with open_regular(path) as file:
            text = file.read().decode()
        found = shard.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{shard} is no ordinary file")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shard} or {path.name} can't be read ({error}); restore the tar, or {remedy}") from error
    index = parse_index(text, shard, str(path), remedy)
    if found.st_size != index.size:
        raise DataError(
            f"{path} is stale: it describes a tar of {index.size} bytes, {shard.name} has {found.st_size}; "
            f"restore the tar, or {remedy}"
        )
    return index


def index_command(shard: Path) -> str:
    return f"run: python launch/make_shards.py --index '{shard}'"


def has_index(shard: Path) -> bool:
    """Tests whether ``shard`` has a readable index for a tar of its size."""
    try:
        load_index(shard)
    except DataError:
        return False
    return True


def is_indexed(shard: Path) -> bool:
    """Tests whether ``shard`` has a readable index for a tar of its size and modification time."""
    return has_index(shard) and has_indexed_time(shard, sidecar_path(shard))


def confirm_index(shard: Path) -> bool:
    """Tests whether ``shard`` matches its index, by time or else by checksum. If it does, the index gets its time again."""
    if is_indexed(shard):
        return True
    if find_damage(shard):
        return False
    with suppress(OSError):  # in a read-only folder the checksum is compared each time
        copy_time(sidecar_path(shard), shard)
    return True


def find_damage(shard: Path) -> str:
    """Compares all of ``shard`` with the size and checksum in its index, and returns the problem; empty if there is none."""
    try:
        index = load_index(shard)
        found = sha256_of(shard)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{shard} can't be read ({error}); restore it"
    if found == index.sha256:
        return ""
    return (
        f"{shard} is damaged, or its index is stale: its checksum is {found[:12]}..., the index has {index.sha256[:12]}...; "
        f"restore the tar, or if it was changed on purpose, delete {sidecar_path(shard).name} and {index_command(shard)}"
    )


def copy_time(sidecar: Path, shard: Path) -> None:
    """Gives an index the modification time of its tar."""
    changed_us = shard.stat().st_mtime_ns // 1000
    os.utime(sidecar, ns=(changed_us * 1000, changed_us * 1000))


def has_indexed_time(shard: Path, sidecar: Path) -> bool:
    """Tests whether a tar has the time of its index. It hasn't after a change, or after a copy without times."""
    return sidecar.stat().st_mtime_ns // 1000 == shard.stat().st_mtime_ns // 1000


def is_newer(shard: Path, sidecar: Path) -> bool:
    """Tests whether a tar was changed after it was indexed, according to their times.

    If the index was copied without times, or written by an earlier version, the tar counts as newer only by more than a day,
    because it may have been copied later.
    """
    indexed, changed = sidecar.stat().st_mtime_ns, shard.stat().st_mtime_ns
    return changed // 1000 > indexed // 1000 if indexed % 1000 == 0 else changed > indexed + DAY_NS
