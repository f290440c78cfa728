"""Reading a WebDataset tar's headers: which samples it holds, and where."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

from svite_scale.errors import DataError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
LABEL_EXTENSION = "cls"
BLOCK = 512
"""Tar headers and members start at multiples of this many bytes."""
METADATA = re.compile(r"__[^/]*__($|/)")
"""Members that WebDataset sets apart from samples."""
LABEL = re.compile(rb"\s*\d{1,9}\s*")


class TarSample(NamedTuple):
    """One sample of a shard: the image's place and the label."""

    key: str
    offset: int
    length: int
    label: int


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension as WebDataset splits them: at the first dot of the file name; ``a/b.seg.PNG`` gives
    ``("a/b", "seg.png")``."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def scan_tar(shard: Path) -> list[TarSample]:
    """The samples of ``shard`` in the order of their images. Members other than images and labels are left out.

    Raises:
        DataError: the tar is damaged or compressed, or a sample has no image, two images, or no integer label.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if not member.isreg() or METADATA.match(member.name):
                    continue
                key, extension = split_name(member.name)
                if extension in IMAGE_EXTENSIONS:
                    if key in images:
                        raise DataError(f"{shard}: sample {key!r} has two images; keep one")
                    images[key] = (member.offset_data, member.size)
                elif extension == LABEL_EXTENSION:
                    labels[key] = read_label(tar, member, shard)
            check_end(file, end, shard)
    except tarfile.TarError as error:
        raise DataError(f"{shard} is not a readable, uncompressed tar ({error}); write it again") from error
    unpaired = images.keys() ^ labels.keys()
    if unpaired:
        key = min(unpaired)
        lacks = f"label ({key}.{LABEL_EXTENSION})" if key in images else f"image ({' or '.join(sorted(IMAGE_EXTENSIONS))})"
        raise DataError(f"{shard}: sample {key!r} has no {lacks}; write the shard again with both")
    return [TarSample(key, offset, length, labels[key]) for key, (offset, length) in images.items()]


def read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    content = tar.extractfile(member)
    assert content is not None, "only regular members have labels"
    text = content.read()
    if not LABEL.fullmatch(text):
        raise DataError(f"{shard}: {member.name} holds {text[:20]!r}; a label is a class number from 0, as text")
    return int(text)


def check_end(file: IO[bytes], end: int, shard: Path) -> None:
    """Requires the end-of-archive zeros at ``end``: tarfile stops at a damaged header as if the archive ended there."""
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise DataError(f"{shard} is damaged or cut off near byte {end}: no valid header and no end mark; write it again")
