"""Reading a WebDataset tar's headers: which samples it holds, and where."""

from __future__ import annotations

import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from svite_scale.data.labels import LabelRule
from svite_scale.data.left_out import in_words, kind_of
from svite_scale.errors import DataError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
LABEL_EXTENSION = "cls"
LABEL_MEMBERS = frozenset({LABEL_EXTENSION, "json"})
BLOCK = 512
"""Tar headers and members start at multiples of this many bytes."""
METADATA = re.compile(r"__[^/]*__($|/)")
"""Members that WebDataset sets apart from samples."""
COMPRESSED = {
    b"\x1f\x8b": ("gunzip", ".gz"),
    b"BZh": ("bunzip2", ".bz2"),
    b"\xfd7zXZ": ("unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("unzstd --rm", ".zst"),
}
"""What undoes a compression, and the suffix it wants, by the first bytes of a file."""


class TarSample(NamedTuple):
    """One sample of a shard: the image's place and the label."""

    key: str
    offset: int
    length: int
    label: int


class Scan(NamedTuple):
    """The samples of a shard in the order of their images, and the other members, counted by kind."""

    samples: list[TarSample]
    left_out: Counter[str]


class Contents(NamedTuple):
    """What a tar holds, by the samples' keys."""

    images: dict[str, tuple[int, int]]
    """First byte and length."""
    label_members: dict[str, dict[str, bytes]]
    """``cls`` and ``json``."""
    others: dict[str, list[str]]
    """Extensions of all other members."""
    left_out: Counter[str]
    """The same by kind, and hidden members, which have no key."""


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension as WebDataset splits them: at the first dot of the file name; ``a/b.seg.PNG`` gives
    ``("a/b", "seg.png")``."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def scan_tar(shard: Path, rule: LabelRule | None = None) -> Scan:
    """The samples of ``shard``. Members other than images and labels are left out.

    An image of no bytes is a sample like any other.

    Args:
        shard: the tar.
        rule: where labels stand; by default in ``.cls``, or else in ``.json``.

    Raises:
        DataError: the tar is damaged or compressed, or holds no images, or a sample has no image, two images, or no label.
    """
    contents = read_tar(shard)
    rule = rule or LabelRule()
    labels: dict[str, int | None] = {}
    for key in {**contents.images, **contents.label_members}:
        try:
            labels[key] = rule.label(key, contents.label_members.get(key, {}))
        except DataError as error:
            raise DataError(f"{shard}: sample {key!r}: {error}") from error
    unlabelled = [key for key in contents.images if labels[key] is None]
    if unlabelled:
        raise DataError(
            f"{shard}: sample {unlabelled[0]!r} has no label ({rule}); say where it stands, or write the shard again"
        )
    extensions = " or ".join(sorted(IMAGE_EXTENSIONS))
    for key in sorted(contents.others.keys() - contents.images.keys()):
        for extension in contents.others[key]:
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS | {LABEL_EXTENSION}:
                problem = f"sample {key!r} has no image ({extensions}) but {f'.{extension}'!r}, which begins at the first dot"
                raise DataError(f"{shard}: {problem}; write the shard again with no other dots in names")
    blind = sorted(key for key, label in labels.items() if label is not None and key not in contents.images)
    if blind:
        raise DataError(f"{shard}: sample {blind[0]!r} has no image ({extensions}); write the shard again with it")
    if not contents.images:
        found = in_words(contents.left_out) or "nothing"
        raise DataError(f"{shard} has no image ({extensions}), but {found}; convert the images, or leave the shard out")
    samples = [TarSample(key, *place, label) for key, place in contents.images.items() if (label := labels[key]) is not None]
    return Scan(samples, contents.left_out)


def read_tar(shard: Path) -> Contents:
    """Images and labels of ``shard``.

    Raises:
        DataError: the tar is damaged or compressed, two members are the same part of a sample, or one is a link.
    """
    contents = Contents({}, defaultdict(dict), defaultdict(list), Counter())
    try:
        with open(shard, "rb") as file:
            refuse_compressed(file, shard)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in regular_members(tar, file, shard):
                    add_member(contents, tar, member, shard)
    except tarfile.TarError as error:
        raise DataError(f"{shard} is not a readable, uncompressed tar ({error}); write it again") from error
    return contents


def add_member(contents: Contents, tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> None:
    key, extension = split_name(member.name)
    file = member.name.rpartition("/")[2]
    if file.startswith("."):
        contents.left_out[kind_of(file, extension)] += 1
    elif extension in IMAGE_EXTENSIONS:
        if key in contents.images:
            raise DataError(f"{shard}: sample {key!r} has two images; keep one")
        contents.images[key] = (member.offset_data, member.size)
    elif extension in LABEL_MEMBERS:
        if extension in contents.label_members[key]:
            raise DataError(f"{shard}: sample {key!r} has two .{extension} members; keep one")
        content = tar.extractfile(member)
        assert content is not None, "only regular members are read"
        contents.label_members[key][extension] = content.read()
    else:
        contents.others[key].append(extension)
        contents.left_out[kind_of(file, extension)] += 1


def regular_members(tar: tarfile.TarFile, file: IO[bytes], shard: Path) -> Iterator[tarfile.TarInfo]:
    """The members of ``tar`` that are files of a sample, up to a proper end of the archive."""
    end = 0
    for member in tar:
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        if member.isdir() or METADATA.match(member.name):
            continue
        if not member.isreg() or member.issparse():
            raise DataError(
                f"{shard}: {member.name!r} is a link, a sparse or a special file; write the shard again with its content"
            )
        yield member
    check_end(file, end, shard)


def refuse_compressed(file: IO[bytes], shard: Path) -> None:
    """Samples are read at their places, which a compressed tar doesn't have."""
    start = file.read(8)
    file.seek(0)
    for magic, (tool, suffix) in COMPRESSED.items():
        if start.startswith(magic):
            packed = f"{shard}{suffix}" if shard.suffix == ".tar" else str(shard)
            command = f"{tool} '{packed}'" if packed == str(shard) else f"mv '{shard}' '{packed}' && {tool} '{packed}'"
            raise DataError(f"{shard} is compressed, so that no sample can be read by itself; unpack it: {command}")


def check_end(file: IO[bytes], end: int, shard: Path) -> None:
    """Requires zeros from ``end`` to the end of the file, the archive's end mark.

    tarfile stops at a damaged header as if the archive ended there, and takes a zeroed one for the end mark.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if block != bytes(BLOCK):
        raise DataError(f"{shard} is damaged or cut off near byte {end}: no valid header and no end mark; write it again")
    while block:
        if block.count(0) != len(block):
            raise DataError(
                f"{shard} is damaged near byte {end}: an end mark (or a zeroed header), and data after it; write it again"
            )
        block = file.read(1 << 20)
