"""Shards from image files: a folder in ImageNet's layout, or a flat one with a list of labels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from svite_scale.data.left_out import in_words, kind_of
from svite_scale.data.scan import IMAGE_EXTENSIONS
from svite_scale.data.shards import Sample
from svite_scale.data.source import Source, permutation
from svite_scale.errors import DataError


class ImageFiles(Source):
    """Image files with labels, in a fixed permutation, so that a shard holds samples of many classes.

    Args:
        root: folder that the files are in.
        files: paths within it and labels; their order matters.
        classes: names of the labels, if there are any.
    """

    def __init__(self, root: Path, files: Sequence[tuple[str, int]], classes: Sequence[str] | None) -> None:
        self._root = root
        self._files = [files[position] for position in permutation(len(files))]
        self.keys = [f"{number:08d}-{key_part(file)}" for number, (file, _) in enumerate(self._files)]
        self.classes = classes

    def sample(self, number: int) -> Sample:
        file, label = self._files[number]
        path = self._root / file
        try:
            image = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} can't be read ({error}); restore it, or take it out") from error
        if not image:
            raise DataError(f"{path} is empty; restore it, or take it out")
        return Sample(self.keys[number], image, extension(file), label)

    def origin(self, number: int) -> str:
        file, label = self._files[number]
        path = self._root / file
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} can't be read ({error}); restore it, or take it out") from error
        return f"{self.keys[number]} {file!a} {label} {stat.st_size} {stat.st_mtime_ns}"


def image_folder(root: str | Path, classes: Mapping[str, int] | None = None) -> ImageFiles:
    """The JPEG and PNG files under a folder in ImageNet's layout, one folder per class.

    Args:
        root: the folder.
        classes: class folders and their labels; by default all that aren't hidden, whose sorted names are numbered from 0.

    Raises:
        DataError: there is no such folder, it has no class folders or not these, or one of them has no image.
    """
    folder = existing_folder(root)
    if classes is None:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not names:
            layout = f"ImageNet's layout is {folder.name}/CLASS/IMAGE.jpg, and --labels is for a flat folder"
            raise DataError(f"{folder} has no class folders; {layout}")
        classes = {name: label for label, name in enumerate(names)}
    for name, label in classes.items():
        if not (folder / name).is_dir():
            raise DataError(f"{folder} has no folder {name!r}, which line {label + 1} of --classes names; correct one of them")
    files = []
    left_out = Counter(kind_of(path.name, extension(path.name)) for path in folder.iterdir() if path.is_file())
    for name, label in classes.items():
        images, others = image_files(folder, name)
        files += [(file, label) for file in images]
        left_out += others
    source = ImageFiles(folder, files, list(classes))
    source.left_out = left_out
    return source


def labelled_files(root: str | Path, labels: Sequence[tuple[str, int]], classes: Sequence[str] | None) -> ImageFiles:
    """The files under a folder that a list names; others there are left out.

    Args:
        root: the folder.
        labels: paths within it, and labels.
        classes: names of the labels, if there are any.

    Raises:
        DataError: there is no such folder, or a file is missing or no JPEG or PNG.
    """
    folder = existing_folder(root)
    for file, _ in labels:
        if extension(file) not in IMAGE_EXTENSIONS or not (folder / file).is_file():
            raise DataError(f"{folder / file}, which --labels names, is no image ({wanted()}) there; correct the list")
    return ImageFiles(folder, labels, classes)


def existing_folder(root: str | Path) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds a folder of images per class")
    return folder


def image_files(root: Path, name: str) -> tuple[list[str], Counter[str]]:
    """Sorted paths, within ``root``, of the images in and under its folder ``name``; and the other files, counted by kind."""
    images, left_out = [], Counter[str]()
    for file in walk(root, name):
        kind = kind_of(os.path.basename(file), extension(file))
        if kind[1:] in IMAGE_EXTENSIONS:
            images.append(file)
        else:
            left_out[kind] += 1
    if not images:
        problem = f"{root / name} has no image ({wanted()}) but {in_words(left_out) or 'nothing'}"
        raise DataError(f"{problem}; every folder counts as a class, unless --classes names them")
    return sorted(images), left_out


def walk(root: Path, name: str) -> Iterator[str]:
    """The files in and under a folder, also where links lead but not in hidden folders, as paths within ``root``."""
    seen = set()
    for folder, folders, files in os.walk(root / name, onerror=refuse, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            raise DataError(f"{folder} leads to {place}, whose files are read already; take the link out")
        seen.add(place)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        inside = os.path.relpath(folder, root)
        yield from (os.path.join(inside, file) for file in files)


def refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} can't be read ({error.strerror}); make it readable, or take it out") from error


def extension(file: str) -> str:
    return os.path.splitext(file)[1][1:].lower()


def wanted() -> str:
    return ", ".join(sorted(IMAGE_EXTENSIONS))


def key_part(file: str) -> str:
    """What a key shows of a file's name: letters and digits that any tar reader takes."""
    return re.sub("[^A-Za-z0-9_-]", "-", Path(file).stem)[:60]
