"""Writing WebDataset tar shards, each with its index."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from webdataset import TarWriter

from svite_scale.data.format.files import remove_leftovers, replacing
from svite_scale.data.format.index import build_index, confirm, load_index, save_index, sidecar_path
from svite_scale.data.format.rule import IMAGE_EXTENSIONS
from svite_scale.data.format.scan import LABEL_EXTENSION
from svite_scale.data.make.processes import in_processes
from svite_scale.errors import DataError

METADATA = re.compile(r"__[^/]*__($|/)")
"""Keys that WebDataset takes for no samples."""
STORED_EXTENSION = {"jpeg": "jpg"}
MAX_KEY_BYTES = 90
"""A portable tar header holds names of 100 bytes, extension included."""


class Sample(NamedTuple):
    """A labelled image as it is stored."""

    key: str
    """Name within the shards, unique, without a dot in its last part."""
    image: bytes
    """Encoded file content."""
    extension: str
    """``jpg``, ``jpeg`` or ``png``; JPEG is stored as ``.jpg``, the name that other readers look for."""
    label: int
    """Class number, from 0."""


def write_shards(samples: Iterable[Sample], directory: str | Path, prefix: str, samples_per_shard: int) -> list[Path]:
    """Writes ``prefix-000000.tar``, ``prefix-000001.tar`` ... with their indexes, and returns the tars' paths.

    The same samples give the same bytes. Each file appears under its name only when it is complete, and replaces one of
    that name. One process writes.

    Args:
        samples: read once, in order.
        directory: created if missing.
        prefix: start of the shards' names.
        samples_per_shard: the last shard may hold fewer.

    Raises:
        DataError: there are no samples, a sample can't be stored, or shards of that prefix would remain from an earlier,
            longer output.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; use at least 1")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, chunk in enumerate(chunks(samples, samples_per_shard)):
        shard = folder / shard_name(prefix, number)
        write_shard(chunk, shard)
        shards.append(shard)
    if not shards:
        raise DataError(f"there are no samples to write to {folder}")
    refuse_longer(folder, prefix, len(shards))
    return shards


def refuse_longer(directory: Path, prefix: str, num_shards: int) -> None:
    """Requires that no shards of ``prefix`` are there beyond the first ``num_shards``: patterns would take them in."""
    shards = {directory / shard_name(prefix, number) for number in range(num_shards)}
    leftover = [shard for shard in existing_shards(directory, prefix) if shard not in shards]
    if leftover:
        last = shard_name(prefix, num_shards - 1)
        raise DataError(f"{leftover[0]} remains from an earlier, longer output; delete it and its like after {last}")


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06d}.tar"


def shard_pattern(prefix: str, num_shards: int) -> str:
    """What names these shards and no others; a glob would take in those of a prefix that begins alike."""
    return f"{prefix}-{{{0:06d}..{num_shards - 1:06d}}}.tar"


def existing_shards(directory: Path, prefix: str) -> list[Path]:
    """The shards of ``prefix`` in ``directory``, in order."""
    name = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")
    return sorted(path for path in directory.glob("*.tar") if name.fullmatch(path.name))


def chunks(samples: Iterable[Sample], size: int) -> Iterator[Iterator[Sample]]:
    """Successive runs of ``size`` samples; each must be consumed before the next is asked for."""
    iterator = iter(samples)
    for first in iterator:
        yield chain([first], islice(iterator, size - 1))


def write_shard(samples: Iterable[Sample], shard: Path, plan: str = "") -> None:
    """Writes one tar, and its index once it is complete; fixed times and owners make the bytes a function of the samples.

    Args:
        samples: at least one.
        shard: the tar.
        plan: checksum of what the samples are made of, for the index.

    Raises:
        DataError: a sample can't be stored.
    """
    # An index of an earlier tar of this name must not outlive it: the sizes can agree by chance.
    sidecar_path(shard).unlink(missing_ok=True)
    with replacing(shard) as temporary, open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            check_sample(sample)
            tar.write(
                {
                    "__key__": sample.key,
                    STORED_EXTENSION.get(sample.extension, sample.extension): sample.image,
                    LABEL_EXTENSION: str(sample.label).encode(),
                }
            )
    index, _ = build_index(shard, plan=plan)
    save_index(index)


def check_sample(sample: Sample) -> None:
    name = sample.key.rpartition("/")[2]
    if not name or "." in name or METADATA.match(sample.key):
        raise DataError(f"sample key {sample.key!r}: webdataset needs a name without dots or a leading __name__; rename it")
    if len(sample.key.encode()) > MAX_KEY_BYTES:
        raise DataError(f"sample key {sample.key!r} is longer than {MAX_KEY_BYTES} bytes; shorten it")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise DataError(f"sample {sample.key!r} has extension {sample.extension!r}; use one of {sorted(IMAGE_EXTENSIONS)}")
    if sample.label < 0:
        raise DataError(f"sample {sample.key!r} has label {sample.label}; number classes from 0")


class Source(ABC):
    """Samples by number, in a fixed order, so that several processes can each make a part of them."""

    keys: Sequence[str]
    """Of the samples, in their order."""
    classes: Sequence[str] | None = None
    """Names of the labels from 0, where the source has them."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Files found that make no sample, counted by kind."""

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """The sample of ``keys[number]``.

        Raises:
            DataError: it can't be made.
        """

    @abstractmethod
    def origin(self, number: int) -> str:
        """What that sample is made of, known without making it: a text that changes when the sample does.

        Raises:
            DataError: it is missing.
        """

    def prepare(self) -> None:  # noqa: B027
        """Loads what all samples need, before processes are forked to make them."""

    @property
    def samples(self) -> Iterator[Sample]:
        """All samples, in order."""
        return (self.sample(number) for number in range(len(self.keys)))


def permutation(count: int, seed: int = 0) -> list[int]:
    """A fixed permutation; numpy keeps the streams of RandomState for ever."""
    return np.random.RandomState(seed).permutation(count).tolist()


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
