"""Scanning the headers of a WebDataset tar for its samples and their places."""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from svite_scale.data.format.files import open_regular
from svite_scale.data.format.labels import LabelRule
from svite_scale.data.format.rule import (
    CONVERT,
    HIDDEN,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    NO_CLASS,
    SPECIAL,
    extension,
    find_class_folders,
    find_images,
    is_hidden,
    kind_of,
    path_parts,
    split_name,
    summarize,
)
from svite_scale.errors import DataError

EXTENSIONS = " or ".join(sorted(IMAGE_EXTENSIONS))
LABEL_EXTENSION = "cls"
LABEL_MEMBERS = frozenset({LABEL_EXTENSION, "json"})
MAX_LABEL_BYTES = 1 << 24
"""A larger ``.json`` member is no label."""
BLOCK = 512
"""Tar headers and members start at multiples of this many bytes."""
VOLUME_LABEL = b"V"
"""GNU's type of a member that holds the tar's name (``tar -V``)."""
FOLDER_LIST = b"D"
"""GNU's type of a folder with a list of its files (``tar --incremental``)."""
COMPRESSED = {
    b"\x1f\x8b": ("gunzip", ".gz"),
    b"BZh": ("bunzip2", ".bz2"),
    b"\xfd7zXZ": ("unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("unzstd --rm", ".zst"),
}
"""By the first bytes of a compressed file, the program that unpacks it and the suffix that the program requires."""


class TarSample(NamedTuple):
    """A sample of a shard: the place of its image, and its label."""

    key: str
    offset: int
    length: int
    label: int


class Scan(NamedTuple):
    """The samples of a shard in the order of their images, and its other members, counted by kind."""

    samples: list[TarSample]
    left_out: Counter[str]


class TarContents(NamedTuple):
    """The members of a tar, in its order. Names don't begin with ``./``."""

    places: dict[str, tuple[int, int]]
    """First byte and length of each file that isn't hidden, by name."""
    label_members: dict[str, dict[str, bytes]]
    """Contents of ``cls`` and ``json`` members, by the samples' keys."""
    left_out: Counter[str]
    """Members that are hidden or no files, counted by kind."""


def scan_tar(shard: Path, rule: LabelRule | None = None) -> Scan:
    """Finds the samples of ``shard``; members other than images and labels are left out.

    An image of 0 bytes is a sample like any other.

    Args:
        shard: the tar.
        rule: the place of the labels; by default ``.cls``, or else ``.json``.

    Raises:
        DataError: the tar is damaged or compressed, or holds no images; or a sample has no image, two images, or no label.
    """
    contents = read_tar(shard)
    rule = rule or LabelRule()
    try:
        if rule.by_folder and (found := scan_class_folders(contents, rule)).samples:
            return found
        return scan_by_keys(contents, rule)
    except DataError as error:
        raise DataError(f"{shard}: {error}") from error


def scan_class_folders(contents: TarContents, rule: LabelRule) -> Scan:
    """Finds the samples of class folders, as in a folder of images: each image is one, and its folder is its class."""
    assert rule.classes is not None, "the rule has classes"
    images, left_out = find_images(list(contents.places))
    samples = []
    for name, folder in zip(images, find_class_folders(images, rule.classes), strict=True):
        if folder is None:
            left_out[kind_of(extension(name)) + NO_CLASS] += 1
        else:
            samples.append(make_sample(name.rpartition(".")[0], contents.places[name], rule.classes[folder]))
    return Scan(samples, contents.left_out + left_out)


def scan_by_keys(contents: TarContents, rule: LabelRule) -> Scan:
    """Finds the samples by keys, as WebDataset does: the members of a key are one sample, label included."""
    images: dict[str, str] = {}
    others = defaultdict(list)
    left_out = contents.left_out.copy()
    for name in contents.places:
        key, kind = split_name(name)
        if kind in IMAGE_EXTENSIONS:
            if key in images:
                raise DataError(f"sample {key!r} has two images; keep one")
            images[key] = name
        elif kind not in contents.label_members.get(key, {}):
            others[key].append(kind)
            left_out[kind_of(kind)] += 1
    labels: dict[str, int | None] = {}
    for key in {**images, **contents.label_members}:
        try:
            labels[key] = rule.label(contents.label_members.get(key, {}))
        except DataError as error:
            raise DataError(f"sample {key!r}: {error}") from error
    for key in images:
        if labels[key] is None:
            raise DataError(explain_missing_label(key, rule))
    for key in sorted(labels.keys() | others.keys()):
        if key not in images:
            refuse_imageless(key, others.get(key, []), labelled=labels.get(key) is not None)
    if not images:
        found = summarize(left_out) or "nothing"
        raise DataError(f"it has no image ({EXTENSIONS}), but {found}; {CONVERT} and pack them again, or leave the shard out")
    samples = [
        make_sample(key, contents.places[name], label) for key, name in images.items() if (label := labels[key]) is not None
    ]
    return Scan(samples, left_out)


def make_sample(key: str, place: tuple[int, int], label: int) -> TarSample:
    if place[1] > MAX_IMAGE_BYTES:
        raise DataError(
            f"the image of sample {key!r} has {place[1]:,} bytes, and one has {MAX_IMAGE_BYTES:,} at most; "
            "write the shard again without it"
        )
    return TarSample(key, *place, label)


def explain_missing_label(key: str, rule: LabelRule) -> str:
    """Returns the problem of an image without a label, and the remedy."""
    if rule.by_folder:
        return (
            f"sample {key!r} lies in the folder {'/'.join(path_parts(key)[:-1])!r}, which is no class of --classes, and so "
            f"does every other image; nor has it {rule} with the name of one; give --classes the names of the class folders"
        )
    return f"sample {key!r} has no label ({rule}); say where it is (--label-key, --classes), or write the shard again"


def refuse_imageless(key: str, others: list[str], *, labelled: bool) -> None:
    """Raises DataError if the members of a key without an image look like a sample that lacks it."""
    for kind in others:
        if kind.rpartition(".")[2] in IMAGE_EXTENSIONS | {LABEL_EXTENSION}:
            problem = f"sample {key!r} has no image ({EXTENSIONS}) but {f'.{kind}'!r}, which begins at the first dot"
            raise DataError(f"{problem}; write the shard again with no other dots in names")
    if labelled and others:
        raise DataError(
            f"sample {key!r} has no image ({EXTENSIONS}) but {f'.{others[0]}'!r}; {CONVERT} and write the shard again"
        )
    if labelled:
        raise DataError(f"sample {key!r} has no image ({EXTENSIONS}); write the shard again with it")


def read_tar(shard: Path) -> TarContents:
    """Reads the members of ``shard``.

    Raises:
        DataError: the tar is damaged or compressed, two members are the same part of a sample, or the content of one isn't
            there.
    """
    contents = TarContents({}, defaultdict(dict), Counter())
    try:
        with open_regular(shard) as file:
            refuse_compressed(file, shard)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in iterate_members(tar, file, shard):
                    add_member(contents, tar, member, shard)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise DataError(f"{shard} is not a readable, uncompressed tar ({error}); write it again") from error
    return contents


def add_member(contents: TarContents, tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> None:
    name = "/".join(path_parts(member.name)).replace("\0", "\ufffd")  # the only character that an index can't hold
    if is_hidden(path_parts(name)):
        contents.left_out[HIDDEN] += 1
        return
    if member.type == VOLUME_LABEL:
        contents.left_out["volume label"] += 1
        return
    if member.isfifo() or member.isdev():
        contents.left_out[SPECIAL] += 1
        return
    place = place_of(member, contents)
    key, kind = split_name(name)
    if place is None:
        raise DataError(
            f"{shard}: {member.name!r} is a link, sparse or in parts, so that its content isn't there in one piece; "
            "pack the shard again (tar --dereference --hard-dereference, and no --sparse), or without it"
        )
    if name in contents.places and kind in IMAGE_EXTENSIONS:
        raise DataError(f"{shard}: sample {key!r} has two images; keep one")
    contents.places[name] = place
    if kind in LABEL_MEMBERS and place[1] <= MAX_LABEL_BYTES:
        if kind in contents.label_members[key]:
            raise DataError(f"{shard}: sample {key!r} has two .{kind} members; keep one")
        content = tar.extractfile(member)
        assert content is not None, "the member has a content"
        contents.label_members[key][kind] = content.read()


def place_of(member: tarfile.TarInfo, contents: TarContents) -> tuple[int, int] | None:
    """Returns first byte and length of a member's content, which a hard link shares with its target; None if it has none."""
    if member.islnk():
        return contents.places.get("/".join(path_parts(member.linkname)))
    return (member.offset_data, member.size) if member.isreg() and not member.issparse() else None


def iterate_members(tar: tarfile.TarFile, file: IO[bytes], shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the members of ``tar`` that are no folders, and checks the end of the archive."""
    for member in tar:
        if member.size < 0:
            raise DataError(
                f"{shard} is damaged near byte {member.offset}: {member.name!r} has a negative size; write it again"
            )
        if not member.isdir() and member.type != FOLDER_LIST:
            yield member
    check_end(file, tar.offset, shard)


def refuse_compressed(file: IO[bytes], shard: Path) -> None:
    """Raises DataError for a compressed tar, whose samples can't be read at their places."""
    start = file.read(8)
    file.seek(0)
    for magic, (tool, suffix) in COMPRESSED.items():
        if start.startswith(magic):
            packed = f"{shard}{suffix}" if shard.suffix == ".tar" else str(shard)
            command = f"{tool} '{packed}'" if packed == str(shard) else f"mv '{shard}' '{packed}' && {tool} '{packed}'"
            raise DataError(f"{shard} is compressed, so that no sample can be read by itself; unpack it: {command}")


def check_end(file: IO[bytes], end: int, shard: Path) -> None:
    """Raises DataError unless there are only zeros from ``end`` to the end of the file, the archive's end mark.

    tarfile stops at a damaged header as if the archive ended there, and takes a zeroed header for the end mark.
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
