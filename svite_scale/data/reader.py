"""Reading byte ranges of shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svite_scale.data.remote.cache import RemoteShard
from svite_scale.errors import DataError


class ShardReader:
    """Reads byte ranges, keeping the most recently used shards open.

    Descriptors are opened when first needed, and remote shards fetched. ``os.pread`` uses no file position, so descriptors
    that a forked worker inherits serve both processes.

    Args:
        paths: the shards, by number; local or remote.
        max_open: descriptors kept; a data set can have more shards than a process may open files.
    """

    def __init__(self, paths: Sequence[Path | RemoteShard], max_open: int = 128) -> None:
        self._paths = list(paths)
        self._max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """The ``length`` bytes of shard number ``shard`` from ``offset``.

        Raises:
            DataError: the file can't be fetched or read, or ends before.
        """
        try:
            data = os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            raise DataError(f"{self._paths[shard]} can't be read at byte {offset} ({error}); restore the file") from error
        if len(data) != length:
            raise DataError(f"{self._paths[shard]} ends before byte {offset + length}, inside a sample; write the shard again")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            self._close_evicted()
            path = self._paths[shard]
            self._descriptors[shard] = path.open() if isinstance(path, RemoteShard) else os.open(path, os.O_RDONLY)
            if len(self._descriptors) > self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _close_evicted(self) -> None:
        """Closes the remote shards that are no longer in the cache, for while they are open they take room on the disk."""
        for shard in list(self._descriptors):
            if isinstance(self._paths[shard], RemoteShard) and not os.fstat(self._descriptors[shard]).st_nlink:
                os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        """Closes this process's descriptors; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Descriptor numbers mean nothing in a process started by spawn.
        return {**self.__dict__, "_descriptors": OrderedDict()}
