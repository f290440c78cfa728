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
    find_images,
    is_hidden,
    kind_of,
    path_parts,
    summarize,
)
from svite_scale.data.make.shards import Sample, Source, permutation
from svite_scale.errors import DataError

KNOWN_EXTENSIONS = ", ".join(sorted(IMAGE_EXTENSIONS))


class ImageFiles(Source):
    """Image files with labels, in a fixed permutation, so that a shard holds samples of many classes.

    Args:
        root: folder of the files.
        files: paths within the folder, and labels; the permutation depends on their order.
        classes: names of the labels, if they have names.
    """

    def __init__(self, root: Path, files: Sequence[tuple[str, int]], classes: Sequence[str] | None) -> None:
        self._root = root
        self._files = [files[position] for position in permutation(len(files))]
        self.keys = [f"{number:08d}-{readable_stem(file)}" for number, (file, _) in enumerate(self._files)]
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
    """Finds the JPEG and PNG files under a folder in ImageNet's layout, one folder per class.

    Args:
        root: the folder.
        classes: class folders and their labels; by default all folders that aren't hidden, numbered from 0 in sorted order.

    Raises:
        DataError: the folder is missing, a class folder is missing, or one has no image.
    """
    folder = require_folder(root)
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
    found, left_out = find_files(folder)
    images, others = find_images(found)
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
    """Finds the files under a folder that a list names; others are left out.

    Args:
        root: the folder.
        labels: paths within the folder, and labels.
        classes: names of the labels, if they have names.

    Raises:
        DataError: the folder is missing, or a file is missing or is no JPEG or PNG.
    """
    folder = require_folder(root)
    for file, _ in labels:
        if extension(file) not in IMAGE_EXTENSIONS or not (folder / file).is_file():
            raise DataError(f"{folder / file}, which --labels names, is no image ({KNOWN_EXTENSIONS}) there; correct the list")
    source = ImageFiles(folder, labels, classes)
    named = {"/".join(path_parts(file)) for file, _ in labels}
    found, left_out = find_files(folder)
    images, others = find_images([file for file in found if file not in named])
    source.left_out = left_out + others + Counter(f"{kind_of(extension(image))} not in --labels" for image in images)
    return source


def require_folder(root: str | Path, content: str = "a folder of images per class") -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds {content}")
    return folder


def class_of(file: str) -> str:
    """Returns the outermost folder of a path; empty if it has none."""
    return file.partition("/")[0] if "/" in file else ""


def refuse_empty(
    root: Path, labels: Mapping[str, int], files: Sequence[tuple[str, int]], found: Sequence[str], *, by_list: bool
) -> None:
    """Raises DataError for a class without an image."""
    full = {label for _, label in files}
    for name, label in labels.items():
        if label not in full:
            _, others = find_images([file for file in found if class_of(file) == name])
            problem = f"{root / name} has no image ({KNOWN_EXTENSIONS}) but {summarize(others) or 'nothing'}"
            if by_list:
                raise DataError(f"{problem}; {CONVERT}, or take it out of --classes")
            raise DataError(f"{problem}; every folder counts as a class, unless --classes names them; or {CONVERT}")


def find_files(root: Path) -> tuple[list[str], Counter[str]]:
    """Finds the files in and under a folder, and follows links. The files of hidden folders are only counted.

    Returns:
        Paths within the folder; and hidden or special files, counted by kind.
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
        for entry in list_entries(root / folder):
            inside = os.path.join(folder, entry.name)
            if is_folder(entry) and is_hidden([entry.name]):
                left_out[HIDDEN] += sum(len(hidden) for _, _, hidden in os.walk(entry.path))
            elif is_folder(entry):
                waiting.append(inside)
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
                files.append(inside)  # a broken link is reported when it is read
            else:
                left_out[SPECIAL] += 1
    return files, left_out


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
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


def describe_text_order(classes: Sequence[str]) -> str:
    """Returns a warning if class folders are named by numbers and sorted as text, 10 before 2; otherwise an empty text."""
    if not all(re.fullmatch("[0-9]{1,18}", name) for name in classes):
        return ""
    for label, (name, following) in enumerate(pairwise(classes)):
        if int(name) > int(following):
            return (
                f"class folders are numbered in the order of text: {name!r} is label {label}, and {following!r} is label "
                f"{label + 1}; for the order of numbers give a list of them, one a line (ls | sort -n), as --classes"
            )
    return ""


def readable_stem(file: str) -> str:
    """Returns the part of a file's name that its key shows: letters and digits that any tar reader accepts."""
    return re.sub("[^A-Za-z0-9_-]", "-", Path(file).stem)[:60]
