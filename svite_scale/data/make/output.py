"""All shards of a source, written by several processes; what a killed run finished stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from svite_scale.data.format.files import remove_leftovers
from svite_scale.data.format.index import confirm, load_index, sidecar_path
from svite_scale.data.make.processes import in_processes
from svite_scale.data.make.shards import refuse_longer, shard_name, write_shard
from svite_scale.data.make.source import Source
from svite_scale.errors import DataError


class Output:
    """The shards of one source: ``prefix-000000.tar``, ``prefix-000001.tar`` ..., and their indexes.

    Their bytes are a function of the source, whatever the number of processes and however often the writing was cut off. One
    command at a time may write a prefix.

    Args:
        source: what to write.
        directory: created if missing.
        prefix: start of the shards' names.
        samples_per_shard: the last shard may hold fewer.

    Raises:
        DataError: there are no samples, or shards of that prefix would remain from an earlier, longer output.
    """

    def __init__(self, source: Source, directory: str | Path, prefix: str, samples_per_shard: int) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard is {samples_per_shard}; use at least 1")
        folder = Path(directory)
        if not source.keys:
            raise DataError(f"there are no samples to write to {folder}")
        self._source = source
        numbers = range(len(source.keys))
        self._parts = [numbers[start : start + samples_per_shard] for start in numbers[::samples_per_shard]]
        folder.mkdir(parents=True, exist_ok=True)
        refuse_longer(folder, prefix, len(self._parts))
        self.shards = [folder / shard_name(prefix, number) for number in range(len(self._parts))]

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [len(part) for part in self._parts]

    def missing(self, workers: int) -> list[int]:
        """Numbers of the shards that aren't finished: whose index doesn't fit the tar, or was written for other samples."""
        finished = dict(in_processes(self._is_finished, range(len(self.shards)), workers))
        return [number for number in range(len(self.shards)) if not finished[number]]

    def write(self, missing: Sequence[int], workers: int) -> Iterator[int]:
        """Writes these shards, and yields the number of samples of each as it is complete.

        Raises:
            DataError: a sample can't be made or stored.
        """
        if missing:
            self._source.prepare()
        try:
            yield from in_processes(self._write, missing, workers)
        finally:
            # Also what earlier runs left, if they were killed.
            remove_leftovers([*self.shards, *map(sidecar_path, self.shards)])

    def _is_finished(self, number: int) -> tuple[int, bool]:
        shard = self.shards[number]
        if not sidecar_path(shard).exists():
            return number, False  # without a look at the samples, which takes a while on a network's file system
        try:
            index = load_index(shard)
        except DataError:
            return number, False
        return number, index.plan == self._plan(number) and confirm(shard)

    def _write(self, number: int) -> int:
        plan = self._plan(number)  # first: a file that changes meanwhile has the shard written again the next time
        write_shard((self._source.sample(sample) for sample in self._parts[number]), self.shards[number], plan)
        return len(self._parts[number])

    def _plan(self, number: int) -> str:
        """Checksum of what a shard's samples are made of."""
        text = "\n".join(self._source.origin(sample) for sample in self._parts[number])
        return hashlib.sha256(text.encode()).hexdigest()
