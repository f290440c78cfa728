"""The index of a tar shard: where each image lies, and its label; kept in a small JSON sidecar next to the shard.

An index tells by its own time of change, in whole microseconds, when its tar was changed. A time within it would make its bytes
depend on more than the tar. A copy that keeps times, rounded to seconds or not, keeps this; one that doesn't gives the index a
time with other digits, from which nothing follows.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
    """What random access to one shard needs.

    Columns are numpy arrays, so that an index of millions of samples stays compact and is shared with forked workers: 16
    bytes per sample, and the packed keys.
    """

    path: Path | RemoteShard
    """The tar file."""
    size: int
    """Its length in bytes, by which a stale index is recognised at once."""
    sha256: str
    """Of its content, by which damage is recognised, in hexadecimal."""
    plan: str
    """What it was written from, as a checksum by which the writer knows its own; empty for shards of others."""
    offsets: npt.NDArray[np.int64]
    """``[count]``: first byte of each image."""
    lengths: npt.NDArray[np.int32]
    """``[count]``: bytes of each image; 0 where the image is empty."""
    labels: npt.NDArray[np.int32]
    """``[count]``"""
    packed_keys: bytes
    """The keys, which only messages need: zero-separated UTF-8 (other bytes as Python's ``surrogateescape``), compressed."""

    @property
    def count(self) -> int:
        """Samples in the shard."""
        return len(self.offsets)

    @property
    def keys(self) -> list[str]:
        """The samples' keys; unpacked at each call."""
        return zlib.decompress(self.packed_keys).decode(errors="surrogateescape").split("\0") if self.count else []

    def key(self, position: int) -> str:
        """Key of the sample at ``position`` of the shard."""
        return self.keys[position]


def sidecar_path(shard: Path) -> Path:
    """Where the index of ``shard`` is kept."""
    return shard.with_name(shard.name + ".index.json")


def build_index(shard: Path, rule: LabelRule | None = None, plan: str = "") -> tuple[ShardIndex, Counter[str]]:
    """Builds the index by reading the whole tar, once for its headers and once for the checksum.

    Returns:
        The index, and the members that belong to no sample, counted by kind.

    Raises:
        DataError: the tar is damaged or compressed, or a sample has no image or no label, or the tar changes meanwhile.
    """
    before = shard.stat()
    samples, left_out = scan_tar(shard, rule)
    index = index_of(shard, before.st_size, sha256_of(shard), plan, *zip(*samples, strict=True))
    after = shard.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DataError(f"{shard} changes while it is read; index it when it is complete")
    return index, left_out


def index_of(
    shard: Path,
    size: int,
    sha256: str,
    plan: str,
    keys: Sequence[str],
    offsets: Sequence[int],
    lengths: Sequence[int],
    labels: Sequence[int],
) -> ShardIndex:
    return ShardIndex(
        path=shard,
        size=size,
        sha256=sha256,
        plan=plan,
        offsets=np.array(offsets, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int32),
        labels=np.array(labels, dtype=np.int32),
        packed_keys=zlib.compress("\0".join(keys).encode(errors="surrogateescape"), level=1),
    )


def save_index(index: ShardIndex) -> Path:
    """Writes the sidecar in one step and returns its path; it gets the tar's time of change, see ``index_time``."""
    record = {
        "format": FORMAT,
        "size": index.size,
        "sha256": index.sha256,
        "plan": index.plan,
        "keys": index.keys,
        "offsets": index.offsets.tolist(),
        "lengths": index.lengths.tolist(),
        "labels": index.labels.tolist(),
    }
    assert isinstance(index.path, Path), "indexes are written where the shards are"
    path = sidecar_path(index.path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
        give_time(temporary, index.path)
    return path


def parse_index(text: str, shard: Path, source: str, remedy: str) -> ShardIndex:
    """The index that a sidecar's text describes; reads no file.

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
        columns = [record[name] for name in ("keys", "offsets", "lengths", "labels")]
        require([record["size"]], int)
        for column, kind in zip(columns, (str, int, int, int), strict=True):
            require(column, kind)
        if len({len(column) for column in columns}) != 1:
            raise ValueError("columns of unequal length")
        if any("\0" in key for key in columns[0]):
            raise ValueError("a key with a zero byte")
        index = index_of(shard, record["size"], str(record["sha256"]), str(record["plan"]), *columns)
        if min(int(column.min(initial=0)) for column in (index.offsets, index.lengths, index.labels)) < 0:
            raise ValueError("a negative number")
        if (index.offsets > index.size - index.lengths.astype(np.int64)).any():
            raise ValueError("an image beyond the tar's end")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{source} is not a readable index ({error!r}); {remedy}") from error
    return index


def require(column: object, kind: type) -> None:
    """Raises ValueError for what isn't a list of nothing but ``kind``; numpy would take a text or a fraction for a number."""
    if not isinstance(column, list):
        raise ValueError(f"{str(column)[:40]!r} for a list")
    if set(map(type, column)) - {kind}:
        wrong = next(element for element in column if type(element) is not kind)
        raise ValueError(f"{str(wrong)[:40]!r} where only {kind.__name__} may stand")


def load_index(shard: Path) -> ShardIndex:
    """Reads the sidecar of ``shard``, and compares the size that it tells with the tar's.

    Raises:
        DataError: it is missing, unreadable, or was written for another version of the tar.
    """
    path = sidecar_path(shard)
    remedy = index_again(shard)
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


def index_again(shard: Path) -> str:
    return f"run: python launch/make_shards.py --index '{shard}'"


def has_index(shard: Path) -> bool:
    """Whether ``shard`` has an index that can be read, and is of the size that it tells."""
    try:
        load_index(shard)
    except DataError:
        return False
    return True


def is_indexed(shard: Path) -> bool:
    """Whether ``shard`` has an index that can be used, and is of the time that this was given."""
    return has_index(shard) and is_as_indexed(shard, sidecar_path(shard))


def confirm(shard: Path) -> bool:
    """Whether ``shard`` is as its index says, by its time or else its checksum; then the index is given its time anew."""
    if is_indexed(shard):
        return True
    if damage(shard):
        return False
    with suppress(OSError):  # in a folder that is only for reading the checksum is compared each time
        give_time(sidecar_path(shard), shard)
    return True


def damage(shard: Path) -> str:
    """What is wrong with ``shard``, comparing all of it with the size and checksum in its index; empty if nothing is."""
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
        f"restore the tar, or if it was changed on purpose, delete {sidecar_path(shard).name} and {index_again(shard)}"
    )


def give_time(sidecar: Path, shard: Path) -> None:
    """Gives an index the time of its tar."""
    changed_us = shard.stat().st_mtime_ns // 1000
    os.utime(sidecar, ns=(changed_us * 1000, changed_us * 1000))


def is_as_indexed(shard: Path, sidecar: Path) -> bool:
    """Whether a tar is of the time that its index was given; a copy without times isn't, nor one that was changed since."""
    return sidecar.stat().st_mtime_ns // 1000 == shard.stat().st_mtime_ns // 1000


def is_newer(shard: Path, sidecar: Path) -> bool:
    """Whether a tar was changed after it was indexed, as far as times tell.

    Of an index that was copied without times, or written by an earlier version, a tar may be newer because it was copied later;
    but not by a day.
    """
    indexed, changed = sidecar.stat().st_mtime_ns, shard.stat().st_mtime_ns
    return changed // 1000 > indexed // 1000 if indexed % 1000 == 0 else changed > indexed + DAY_NS
