"""Remote shards, and caches of them, for tests."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from svite_scale.data.format.index import sidecar_path
from svite_scale.data.remote.cache import ShardCache

SIZE = 50_000
NUM_BLOBS = 12
BACKOFF_S = 0.02


def write_blobs(folder: Path, count: int) -> list[str]:
    """Writes files of ``SIZE`` random bytes, which needn't be tars, and returns their names."""
    names = [f"blob-{number:02d}.tar" for number in range(count)]
    for name in names:
        (folder / name).write_bytes(random.Random(name).randbytes(SIZE))
    return names


def link_shards(source: Path, target: Path, missing: str) -> None:
    """Links the shards of ``source`` and their indexes into the new folder ``target``, but not the shard ``missing``."""
    target.mkdir()
    for shard in source.glob("*.tar"):
        for path in (shard, sidecar_path(shard)):
            if path.name != missing:
                (target / path.name).symlink_to(path)


def cache_of(folder: Path, files: int = 100, attempts: int = 3, backoff_s: float = BACKOFF_S) -> ShardCache:
    """A cache with room for ``files`` blobs."""
    return ShardCache(folder, files * SIZE, attempts, backoff_s)


def content_of(cache: ShardCache, url: str, content: bytes) -> bytes:
    """Returns the bytes that the cache gives for a URL whose file is ``content``."""
    descriptor = cache.shard(url, len(content), sha256(content).hexdigest()).open()
    try:
        return os.pread(descriptor, 10 * len(content), 0)
    finally:
        os.close(descriptor)


def files_of(folder: Path) -> list[str]:
    """Names of the cached files, without the hashes before them."""
    return sorted(path.name.partition("-")[2] for path in folder.iterdir() if path.is_file())


def in_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], deadline_s: float = 300.0) -> None:
    """Calls ``function`` in one forked process for each tuple of arguments, all at the same time; each must succeed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=one) for one in arguments]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(deadline_s)
            assert process.exitcode == 0, f"not done after {deadline_s} s" if process.is_alive() else "see its traceback"
    finally:
        for process in processes:
            process.kill()
