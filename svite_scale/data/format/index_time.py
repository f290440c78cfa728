"""Whether a tar is of the time that its index was written for.

An index tells by its own time of change, in whole microseconds, when its tar was changed. A time within it would make its bytes
depend on more than the tar. A copy that keeps times, rounded to seconds or not, keeps this; one that doesn't gives the index a
time with other digits, from which nothing follows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

DAY_NS = 86_400 * 10**9

logger = logging.getLogger(__name__)


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


def warn_of_newer(newer: Sequence[Path], pattern: str, field: str) -> None:
    """Warns of tars that are newer than their indexes, if there are any."""
    if newer:
        logger.warning(
            "%s = %r: %d shards are newer than their indexes (%s is the first), so images and labels may not be as indexed; to "
            "compare them, and write anew what differs, run: python launch/make_shards.py --index '%s'",
            *(field, pattern, len(newer), newer[0].name, pattern),
        )
