"""Writing WebDataset tar shards, each with its index."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from webdataset import TarWriter

from svite_scale.data.format.files import replacing
from svite_scale.data.format.index import build_index, save_index, sidecar_path
from svite_scale.data.format.rule import IMAGE_EXTENSIONS
from svite_scale.data.format.scan import LABEL_EXTENSION
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
