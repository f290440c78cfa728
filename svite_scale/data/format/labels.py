"""Labels from lists of class folders, lists of files, and members of a shard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svite_scale.errors import DataError

LABEL = re.compile(r"([0-9]{1,9})(\.0*)?")
"""A whole number, also written as ``3.0``."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
DEFAULT_KEY = "label"


def read_classes(path: str | Path) -> dict[str, int]:
    """Reads a list of class folders, one a line, and returns their labels; the first line has label 0.

    Raises:
        DataError: the file can't be read or is empty; or a line is empty, no plain name, or repeats another.
    """
    classes: dict[str, int] = {}
    for number, name in enumerate(read_lines(path), start=1):
        if name in ("", ".", "..") or "/" in name:
            raise DataError(f"{path}, line {number} is {name!r}; write the name of one class folder")
        if name in classes:
            raise DataError(f"{path}, line {number}: {name!r} is on line {classes[name] + 1} too; keep one")
        classes[name] = len(classes)
    if not classes:
        raise DataError(f"{path} names no class; write one class folder per line")
    return classes


def read_labels(path: str | Path, classes: Mapping[str, int] | None) -> list[tuple[str, int]]:
    """Reads lines ``FILE LABEL``, and returns files and labels. LABEL is a class number, or a name in ``classes``.

    Raises:
        DataError: the file can't be read or is empty; or a line has another form, or repeats a file.
    """
    labels: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        file, _, text = line.rpartition(" ")
        label = parse_label(text, classes)
        if not file.strip() or label is None:
            known = "a class number from 0, or give the classes' names with --classes"
            if classes:
                known = f"a class, or its number from 0 to {len(classes) - 1}"
            raise DataError(f"{path}, line {number} is {line!r}; write a file and its label: {known}")
        if file.strip() in labels:
            raise DataError(f"{path}, line {number}: {file.strip()!r} is listed twice; keep one")
        labels[file.strip()] = label
    if not labels:
        raise DataError(f"{path} names no file; write lines of a file and its label")
    return list(labels.items())


def read_lines(path: str | Path) -> list[str]:
    """Reads the lines of a text, which may begin with a byte order mark. Like file names, they may hold any bytes."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(UTF_16) or b"\0" in content:
            raise ValueError("it is UTF-16 or no text at all")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); give a text file in UTF-8") from error
    text = content.decode("utf-8-sig", errors="surrogateescape").rstrip()
    return [line.strip().replace("\t", " ") for line in text.split("\n")] if text else []


def parse_label(value: object, classes: Mapping[str, int] | None) -> int | None:
    """Returns the label that ``value``, a number or text, stands for: the class of that name, or else a class number.

    None if it is neither, or no class in ``classes`` has that number.
    """
    if type(value) not in (int, float, str):
        return None
    text = str(value).strip()
    if classes and text in classes:
        return classes[text]
    number = LABEL.fullmatch(text)
    label = int(number[1]) if number else None
    return None if label is None or (classes and label >= len(classes)) else label


@dataclass(frozen=True)
class LabelRule:
    """The place of the labels in a shard.

    By default, a sample's label is its ``.cls`` member, or if it has none, the field ``label`` of its ``.json`` member.
    """

    key: str | None = None
    """Field of ``.json`` that holds every label instead."""
    classes: Mapping[str, int] | None = None
    """Labels by class. The class is the folder in a sample's name (``n01440764/xyz.JPEG``); in a shard without such folders it
    is the content of ``.cls`` or ``.json``, which must be a name; with ``key`` it is the field's content, a name or number."""

    @property
    def by_folder(self) -> bool:
        """True if labels are first looked for in the samples' names."""
        return self.key is None and self.classes is not None

    def label(self, members: Mapping[str, bytes]) -> int | None:
        """Returns the label of the sample whose ``.cls`` and ``.json`` are in ``members``; None if they hold none.

        Raises:
            DataError: something else is in the place of the label.
        """
        if self.key is not None:
            return self._field(members, self.key)
        if "cls" not in members:
            return self._field(members, DEFAULT_KEY)
        label = self._number(members["cls"].decode("utf-8-sig", errors="surrogateescape"))
        if label is None:
            raise DataError(f".cls holds {members['cls'][:20]!r}, which {self._problem()}")
        return label

    def _field(self, members: Mapping[str, bytes], field: str) -> int | None:
        try:
            record = json.loads(members.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise DataError(f".json is not JSON ({error}); correct it") from error
        if not isinstance(record, dict) or field not in record:
            return None
        label = self._number(record[field])
        if label is None:
            raise DataError(f".json has {field} = {str(record[field])[:40]!r}, which {self._problem()}")
        return label

    def _number(self, value: object) -> int | None:
        """Returns the label that ``value`` stands for.

        If folders name the classes, numbers don't count: the shard may number more classes, or in another order.
        """
        if not self.by_folder:
            return parse_label(value, self.classes)
        assert self.classes is not None, "the rule has classes"
        return self.classes.get(value.strip()) if isinstance(value, str) else None

    def _problem(self) -> str:
        if self.by_folder:
            return "is no class of --classes (numbers are labels only without it); correct one of them"
        if self.classes is not None:
            return f"is no class of --classes, nor the number of one, from 0 to {len(self.classes) - 1}; correct one of them"
        return (
            "is no class number from 0; if it is the name of a class, name the classes with --classes; else write the shard "
            "again with numbers, or say with --label-key or --classes where else the label is"
        )

    def __str__(self) -> str:
        if self.key is not None:
            return f"a field {self.key!r} in .json"
        return f".cls, or a field {DEFAULT_KEY!r} in .json"
