"""Writing WebDataset tar shards, each with its index."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from webdataset import TarWriter

from svite_scale.data.format.files import remove_leftovers, replacing
from svite_scale.data.format.index import build_index, confirm_index, load_index, save_index, sidecar_path
from svite_scale.data.format.rule import IMAGE_EXTENSIONS
from svite_scale.data.format.scan import LABEL_EXTENSION
from svite_scale.data.make.processes import in_processes
from svite_scale.errors import DataError

METADATA = re.compile(r"__[^/]*__($|/)")
"""Keys that WebDataset doesn't read as samples."""
STORED_EXTENSION = {"jpeg": "jpg"}
MAX_KEY_BYTES = 90
"""A portable tar header holds names of up to 100 bytes, extension included."""


class Sample(NamedTuple):
    """A labelled image, as it is stored."""

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
        samples: read once, in order; those of one shard are in memory together.
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
    shards: list[Path] = []
    remaining = iter(samples)
    while chunk := list(islice(remaining, samples_per_shard)):
        shards.append(folder / shard_name(prefix, len(shards)))
        write_shard(chunk, shards[-1])
    if not shards:
        raise DataError(f"there are no samples to write to {folder}")
    refuse_longer(folder, prefix, len(shards))
    return shards


def refuse_longer(directory: Path, prefix: str, num_shards: int) -> None:
    """Raises DataError if shards of ``prefix`` exist beyond the first ``num_shards``, because patterns would include them."""
    shards = {directory / shard_name(prefix, number) for number in range(num_shards)}
    leftover = [shard for shard in existing_shards(directory, prefix) if shard not in shards]
    if leftover:
        last = shard_name(prefix, num_shards - 1)
        raise DataError(f"{leftover[0]} remains from an earlier, longer output; delete all shards after {last}")


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06d}.tar"


def shard_pattern(prefix: str, num_shards: int) -> str:
    """Returns the brace pattern of these shards only; a glob would include those of a longer prefix that begins alike."""
    return f"{prefix}-{{{0:06d}..{num_shards - 1:06d}}}.tar"


def existing_shards(directory: Path, prefix: str) -> list[Path]:
    """Returns the shards of ``prefix`` in ``directory``, in order."""
    name = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")
    return sorted(path for path in directory.glob("*.tar") if name.fullmatch(path.name))


def write_shard(samples: Iterable[Sample], shard: Path, source_digest: str = "") -> None:
    """Writes one tar and then its index. Fixed times and owners make the bytes a function of the samples.

    Args:
        samples: at least one.
        shard: the tar.
        source_digest: digest of the files that the samples are made from, for the index.

    Raises:
        DataError: a sample can't be stored.
    """
    # The index of an earlier tar of this name must go first, because the sizes can be equal by chance.
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
    index, _ = build_index(shard, source_digest=source_digest)
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
    """Samples by number, in a fixed order, so that each of several processes can make a part of them."""

    keys: Sequence[str]
    """Keys of the samples, in order."""
    classes: Sequence[str] | None = None
    """Names of the labels from 0, if the source has them."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Files that are no samples, counted by kind."""
    details: Mapping[str, Any] = MappingProxyType({})
    """What ``_info.json`` says about the split beside its shards and classes."""

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """Makes the sample of ``keys[number]``.

        Raises:
            DataError: the sample can't be made.
        """

    def origin(self, number: int) -> str:
        """Returns a text that changes when the sample does, for example its file's name, size and time, without making it.

        Raises:
            DataError: the sample's file is missing.
        """
        return self.keys[number]

    def prepare(self) -> None:  # noqa: B027
        """Loads the data that all samples need, before processes are forked to make them."""


def permutation(count: int) -> list[int]:
    """Returns a fixed permutation. (numpy promises that the streams of RandomState never change.)"""
    return np.random.RandomState(0).permutation(count).tolist()


class Output:
    """The shards of one source, ``prefix-000000.tar``, ``prefix-000001.tar``, ..., with their indexes, written by processes.

    Their bytes are a function of the source, for any number of processes and interruptions. Finished shards of an interrupted
    run are kept. One command at a time may write a prefix.

    Args:
        source: of the samples, at least one.
        directory: created if missing.
        prefix: start of the shards' names.
        samples_per_shard: at least 1; the last shard may hold fewer.

    Raises:
        DataError: shards of that prefix would remain from an earlier, longer output.
    """

    def __init__(self, source: Source, directory: str | Path, prefix: str, samples_per_shard: int) -> None:
        folder = Path(directory)
        self._source = source
        numbers = range(len(source.keys))
        self._parts = [numbers[start : start + samples_per_shard] for start in numbers[::samples_per_shard]]
        folder.mkdir(parents=True, exist_ok=True)
        refuse_longer(folder, prefix, len(self._parts))
        self.shards = [folder / shard_name(prefix, number) for number in range(len(self._parts))]

    @property
    def counts(self) -> list[int]:
        """The number of samples in each shard."""
        return [len(part) for part in self._parts]

    def missing(self, workers: int) -> list[int]:
        """Returns the numbers of the shards whose index is missing, doesn't match the tar, or was written for other samples."""
        finished = dict(in_processes(self._is_finished, range(len(self.shards)), workers))
        return [number for number in range(len(self.shards)) if not finished[number]]

    def write(self, missing: Sequence[int], workers: int) -> Iterator[int]:
        """Writes these shards, and yields the number of samples of each when it is complete.

        Raises:
            DataError: a sample can't be made or stored.
        """
        if missing:
            self._source.prepare()
        try:
            yield from in_processes(self._write, missing, workers)
        finally:
            # This includes files of earlier runs that were killed.
            remove_leftovers([*self.shards, *map(sidecar_path, self.shards)])

    def _is_finished(self, number: int) -> tuple[int, bool]:
        shard = self.shards[number]
        if not sidecar_path(shard).exists():
            return number, False  # without reading the samples' files, which is slow on a network file system
        try:
            index = load_index(shard)
        except DataError:
            return number, False
        return number, index.source_digest == self._source_digest(number) and confirm_index(shard)

    def _write(self, number: int) -> int:
        source_digest = self._source_digest(number)  # first, so a file that changes later is noticed
        write_shard((self._source.sample(sample) for sample in self._parts[number]), self.shards[number], source_digest)
        return len(self._parts[number])

    def _source_digest(self, number: int) -> str:
        """Returns the digest of the files that a shard's samples are made from."""
        text = "\n".join(self._source.origin(sample) for sample in self._parts[number])
        return hashlib.sha256(text.encode()).hexdigest()
