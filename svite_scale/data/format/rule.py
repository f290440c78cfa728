"""Which files are samples, and of which class: one rule for image folders and for tars; docs/data.md has it as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from svite_scale.errors import DataError

SHOWN = 10
HIDDEN = "hidden"
CONVERT = "convert them to PNG or JPEG (ImageMagick: mogrify -format png FILES)"
SPECIAL = "special (pipe, socket or device)"


def kind_of(extension: str) -> str:
    """What a file is counted as: its extension, which is given without the dot, or what it has instead."""
    return f".{extension}" if extension else "without extension"


def in_words(left_out: Mapping[str, int]) -> str:
    """``4 .v2.jpg, 2 .webp``: the most frequent first, and in one line of ASCII whatever the names; empty if there are none."""
    kinds = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
    parts = [f"{left_out[kind]} {kind.encode('unicode_escape').decode()}" for kind in kinds[:SHOWN]]
    if len(kinds) > SHOWN:
        parts.append(f"{sum(left_out[kind] for kind in kinds[SHOWN:])} others")
    return ", ".join(parts)


IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
MAX_IMAGE_BYTES = 0x7FFFF000
"""What one read gives at most on Linux, 4 kB less than 2 GiB."""
NO_CLASS = " of no class in --classes"
"""Ends the kind of images that are left out for it."""


def parts_of(name: str) -> list[str]:
    """Folders and file of a path, without what doesn't count: ``./a//b.jpg`` gives ``["a", "b.jpg"]``."""
    return [part for part in name.split("/") if part not in ("", ".")]


def is_hidden(parts: Iterable[str]) -> bool:
    """Whether a path has a hidden folder in it, or is a hidden file."""
    return any(part.startswith(".") and part != ".." for part in parts)


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension as WebDataset splits them: at the first dot of the file name; ``a/b.seg.PNG`` gives
    ``("a/b", "seg.png")``."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def extension(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; empty if it has none."""
    return name.rpartition("/")[2].partition(".")[2].rpartition(".")[2].lower()


def images_among(names: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """The files that are images, where each is a sample by itself.

    What has more dots goes with the image that is called so up to its first one: ``b.seg.png`` is left out beside ``b.jpg``.

    Args:
        names: paths of files.

    Returns:
        The images, and the other files, counted by kind.
    """
    images: list[str] = []
    left_out = Counter[str]()
    plain = {key for key, rest in map(split_name, names) if rest in IMAGE_EXTENSIONS}
    for name in names:
        key, rest = split_name(name)
        if is_hidden(parts_of(name)):
            left_out[HIDDEN] += 1
        elif extension(name) not in IMAGE_EXTENSIONS:
            left_out[kind_of(extension(name))] += 1
        elif rest not in IMAGE_EXTENSIONS and key in plain:
            left_out[kind_of(rest)] += 1
        else:
            images.append(name)
    return images, left_out


def class_folders(names: Sequence[str], classes: Collection[str]) -> list[str | None]:
    """The class that each file of a tar is of: the folder in its path which ``classes`` names; None where there is none.

    A tar may have been packed from any folder around its class folders. Where a path has several classes in it, such as
    ``train/cat/1.jpg`` where ``train`` is a class too, the class folders are those of the one folder that has all of them.

    Args:
        names: paths of files.
        classes: names of all classes.

    Raises:
        DataError: a path has several classes in it, and there is no such folder.
    """
    found = []
    beside = defaultdict(set)
    for name in names:
        folders = parts_of(name)[:-1]
        candidates = {tuple(folders[:depth]): folder for depth, folder in enumerate(folders) if folder in classes}
        for place, folder in candidates.items():
            beside[place].add(folder)
        found.append(candidates)
    whole = [place for place, folders in beside.items() if len(folders) == len(classes)]
    root = whole[0] if len(whole) == 1 else None
    named: list[str | None] = []
    for name, candidates in zip(names, found, strict=True):
        choices = sorted(set(candidates.values()))
        if root is not None and root in candidates:
            named.append(candidates[root])
        elif len(choices) > 1:
            raise DataError(
                f"{name!r} lies in {' and in '.join(map(repr, choices))}, all in --classes; take out what is no class, "
                "or pack the shard again from inside the folder of classes, without another class's name in its paths"
            )
        else:
            named.append(choices[0] if choices else None)
    return named
