"""Shards from image files: a folder in ImageNet's layout, or a flat one with a list of labels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

from svite_scale.data.format.rule import (
    CONVERT,
    HIDDEN,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    NO_CLASS,
    SPECIAL,
    extension,
    images_among,
    in_words,
    is_hidden,
    kind_of,
    parts_of,
)
from svite_scale.data.make.shards import Sample, Source, permutation
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
            if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
                raise DataError(f"{path} has {size:,} bytes, and an image has {MAX_IMAGE_BYTES:,} at most; take it out")
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
    labels = classes
    if labels is None:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not names:
            layout = f"ImageNet's layout is {folder.name}/CLASS/IMAGE.jpg, and --labels is for a flat folder"
            raise DataError(f"{folder} has no class folders; {layout}")
        labels = {name: label for label, name in enumerate(names)}
    for name, label in labels.items():
        if not (folder / name).is_dir():
            raise DataError(f"{folder} has no folder {name!r}, which line {label + 1} of --classes names; correct one of them")
    found, left_out = walk(folder)
    images, others = images_among(found)
    left_out += others
    files = []
    for image in sorted(images):
        if class_of(image) in labels:
            files.append((image, labels[class_of(image)]))
        else:
            left_out[kind_of(extension(image)) + ("" if classes is None else NO_CLASS)] += 1
    files.sort(key=itemgetter(1))
    refuse_empty(folder, labels, files, found, by_list=classes is not None)
    source = ImageFiles(folder, files, list(labels))
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
    source = ImageFiles(folder, labels, classes)
    named = {"/".join(parts_of(file)) for file, _ in labels}
    found, left_out = walk(folder)
    images, others = images_among([file for file in found if file not in named])
    source.left_out = left_out + others + Counter(f"{kind_of(extension(image))} not in --labels" for image in images)
    return source


def existing_folder(root: str | Path) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds a folder of images per class")
    return folder


def class_of(file: str) -> str:
    """The outermost folder of a path; empty where it has none."""
    return file.partition("/")[0] if "/" in file else ""


def refuse_empty(
    root: Path, labels: Mapping[str, int], files: Sequence[tuple[str, int]], found: Sequence[str], *, by_list: bool
) -> None:
    """Requires an image of each class, among the files that were found."""
    full = {label for _, label in files}
    for name, label in labels.items():
        if label not in full:
            _, others = images_among([file for file in found if class_of(file) == name])
            problem = f"{root / name} has no image ({wanted()}) but {in_words(others) or 'nothing'}"
            if by_list:
                raise DataError(f"{problem}; {CONVERT}, or take it out of --classes")
            raise DataError(f"{problem}; every folder counts as a class, unless --classes names them; or {CONVERT}")


def walk(root: Path) -> tuple[list[str], Counter[str]]:
    """The files in and under a folder, also where links lead, as paths within it; and what is no file, counted by kind.

    Hidden folders are looked into only to count their files.
    """
    files: list[str] = []
    left_out = Counter[str]()
    seen = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        place = os.path.realpath(root / folder)
        if (class_of(f"{folder}/"), place) in seen:
            raise DataError(f"{root / folder} leads to {place}, whose files are read already; take the link out")
        seen.add((class_of(f"{folder}/"), place))
        for entry in entries_of(root / folder):
            inside = os.path.join(folder, entry.name)
            if is_folder(entry) and is_hidden([entry.name]):
                left_out[HIDDEN] += sum(len(hidden) for _, _, hidden in os.walk(entry.path))
            elif is_folder(entry):
                waiting.append(inside)
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
                files.append(inside)  # a link that leads nowhere is told when it is read
            else:
                left_out[SPECIAL] += 1
    return files, left_out


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        problem = f"{error.filename} can't be read ({error.strerror}); make it readable, or take it out"
        raise DataError(problem) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def numbered_as_text(classes: Sequence[str]) -> str:
    """What to say of class folders that are called by numbers and sorted as text, 10 before 2; empty if they aren't."""
    if not all(re.fullmatch("[0-9]{1,18}", name) for name in classes):
        return ""
    for label, (name, following) in enumerate(pairwise(classes)):
        if int(name) > int(following):
            return (
                f"class folders are numbered in the order of text: {name!r} is label {label}, and {following!r} is label "
                f"{label + 1}; for the order of numbers give a list of them, one a line (ls | sort -n), as --classes"
            )
    return ""


def wanted() -> str:
    return ", ".join(sorted(IMAGE_EXTENSIONS))


def key_part(file: str) -> str:
    """What a key shows of a file's name: letters and digits that any tar reader takes."""
    return re.sub("[^A-Za-z0-9_-]", "-", Path(file).stem)[:60]
