"""The rule by which files are samples, and have classes, in image folders and in tars; docs/data.md has it as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from svite_scale.errors import DataError

SHOWN = 10
HIDDEN = "hidden"
CONVERT = "convert them to PNG or JPEG (ImageMagick: mogrify -format png FILES)"
SPECIAL = "special (pipe, socket or device)"


def kind_of(extension: str) -> str:
    """Returns the kind under which a file is counted: its extension, given without the dot, or ``without extension``."""
    return f".{extension}" if extension else "without extension"


def summarize(left_out: Mapping[str, int]) -> str:
    """Returns counts by kind as a text: ``4 .v2.jpg, 2 .webp``, the most frequent first, in ASCII; empty if there are none."""
    kinds = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
    parts = [f"{left_out[kind]} {kind.encode('unicode_escape').decode()}" for kind in kinds[:SHOWN]]
    if len(kinds) > SHOWN:
        parts.append(f"{sum(left_out[kind] for kind in kinds[SHOWN:])} others")
    return ", ".join(parts)


IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
MAX_IMAGE_BYTES = 0x7FFFF000
"""The most that one read returns on Linux, 4 kB less than 2 GiB."""
NO_CLASS = " of no class in --classes"
"""End of the kind of images that are left out because they have no class."""


def path_parts(name: str) -> list[str]:
    """Splits a path into folders and file, without empty parts and dots: ``./a//b.jpg`` gives ``["a", "b.jpg"]``."""
    return [part for part in name.split("/") if part not in ("", ".")]


def is_hidden(parts: Iterable[str]) -> bool:
    """Tests whether a path has a hidden folder in it, or is a hidden file."""
    return any(part.startswith(".") and part != ".." for part in parts)


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into key and extension as WebDataset does, at the first dot of the file name: ``a/b.seg.PNG``
    gives ``("a/b", "seg.png")``."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def extension(name: str) -> str:
    """Returns the part of a file's name after its last dot, in lower case; empty if it has no dot."""
    return name.rpartition("/")[2].partition(".")[2].rpartition(".")[2].lower()


def find_images(names: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """Finds the images among files, each of which is a sample.

    A name with several dots belongs to the image that has its part before the first dot: ``b.seg.png`` is left out beside
    ``b.jpg``.

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
        if is_hidden(path_parts(name)):
            left_out[HIDDEN] += 1
        elif extension(name) not in IMAGE_EXTENSIONS:
            left_out[kind_of(extension(name))] += 1
        elif rest not in IMAGE_EXTENSIONS and key in plain:
            left_out[kind_of(rest)] += 1
        else:
            images.append(name)
    return images, left_out


def find_class_folders(names: Sequence[str], classes: Collection[str]) -> list[str | None]:
    """Returns the class of each file of a tar: the folder in its path that ``classes`` names, or None if there is none.

    A tar may have been packed from any folder around its class folders. If a path has several classes in it, such as
    ``train/cat/1.jpg`` where ``train`` is a class too, the class folders are those in the one folder that holds all classes.

    Args:
        names: paths of files.
        classes: names of all classes.

    Raises:
        DataError: a path has several classes in it, and no single folder holds all classes.
    """
    found = []
    beside = defaultdict(set)
    for name in names:
        folders = path_parts(name)[:-1]
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
