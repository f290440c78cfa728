"""Class numbers from what people keep them in: lists of class folders, lists of files, members of a shard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svite_scale.errors import DataError

LABEL = re.compile(r"([0-9]{1,9})(\.0*)?")
"""A whole number, also as programs write it that keep it among real ones: ``3.0``."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
DEFAULT_KEY = "label"


def read_classes(path: str | Path) -> dict[str, int]:
    """The class folders that a file names, one a line, and their labels: the first line's is 0.

    Raises:
        DataError: the file can't be read, holds nothing, or a line is empty, no plain name, or repeats another.
    """
    classes: dict[str, int] = {}
    for number, name in enumerate(lines_of(path), start=1):
        if name in ("", ".", "..") or "/" in name:
            raise DataError(f"{path}, line {number} is {name!r}; write the name of one class folder")
        if name in classes:
            raise DataError(f"{path}, line {number}: {name!r} stands on line {classes[name] + 1} too; keep one")
        classes[name] = len(classes)
    if not classes:
        raise DataError(f"{path} names no class; write one class folder per line")
    return classes


def read_labels(path: str | Path, classes: Mapping[str, int] | None) -> list[tuple[str, int]]:
    """Files and their labels from lines ``FILE LABEL``, where LABEL is a class number, or with ``classes`` also one of these.

    Raises:
        DataError: the file can't be read, holds nothing, or a line is not of that form, or repeats a file.
    """
    labels: dict[str, int] = {}
    for number, line in enumerate(lines_of(path), start=1):
        file, _, text = line.rpartition(" ")
        label = label_number(text, classes)
        if not file.strip() or label is None:
            known = "a class number from 0, or give the classes' names with --classes"
            if classes:
                known = f"a class, or its number from 0 to {len(classes) - 1}"
            raise DataError(f"{path}, line {number} is {line!r}; write a file and its label: {known}")
        if file.strip() in labels:
            raise DataError(f"{path}, line {number}: {file.strip()!r} stands there twice; keep one")
        labels[file.strip()] = label
    if not labels:
        raise DataError(f"{path} names no file; write lines of a file and its label")
    return list(labels.items())


def lines_of(path: str | Path) -> list[str]:
    """Lines of a text, which may begin with a byte order mark; names in it may be of any bytes, as those of files."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(UTF_16) or b"\0" in content:
            raise ValueError("it is UTF-16 or no text at all")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); give a text file in UTF-8") from error
    text = content.decode("utf-8-sig", errors="surrogateescape").rstrip()
    return [line.strip().replace("\t", " ") for line in text.split("\n")] if text else []


def label_number(value: object, classes: Mapping[str, int] | None) -> int | None:
    """The label that ``value``, a number or text, stands for: that of a class which is called so, or else a class number.

    None if it is neither, or no class among ``classes`` has that number.
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
    """Where the label of a sample in a shard stands.

    By default in its ``.cls`` member, or where it has none in the field ``label`` of its ``.json`` member.
    """

    key: str | None = None
    """Field of ``.json`` to take instead, from every sample."""
    classes: Mapping[str, int] | None = None
    """Labels by class: of the folder in a sample's name (``n01440764/xyz.JPEG``), or in a shard without such folders of what
    ``.cls`` or ``.json`` holds, which must be a name then; with ``key``, of what the field holds, a name or a number."""

    @property
    def by_folder(self) -> bool:
        """Whether labels are looked for in the samples' names first."""
        return self.key is None and self.classes is not None

    def label(self, members: Mapping[str, bytes]) -> int | None:
        """The label of the sample whose ``.cls`` and ``.json`` are in ``members``; None if they have none.

        Raises:
            DataError: where it should stand is something else.
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
            raise DataError(f".json is not JSON ({error}); mend it") from error
        if not isinstance(record, dict) or field not in record:
            return None
        label = self._number(record[field])
        if label is None:
            raise DataError(f".json has {field} = {str(record[field])[:40]!r}, which {self._problem()}")
        return label

    def _number(self, value: object) -> int | None:
        """The label that ``value`` stands for.

        Where classes take the place of folders, numbers aren't taken: the shard may number more classes, or in another order.
        """
        if not self.by_folder:
            return label_number(value, self.classes)
        assert self.classes is not None, "the rule has classes"
        return self.classes.get(value.strip()) if isinstance(value, str) else None

    def _problem(self) -> str:
        if self.by_folder:
            return "is no class of --classes (numbers are read without it); correct one of them"
        if self.classes is not None:
            return f"is no class of --classes, nor the number of one, from 0 to {len(self.classes) - 1}; correct one of them"
        return (
            "is no class number from 0; if it is the name of a class, name the classes with --classes; else write the shard "
            "again with numbers, or say with --label-key or --classes where else the label stands"
        )

    def __str__(self) -> str:
        if self.key is not None:
            return f"a field {self.key!r} in .json"
        return f".cls, or a field {DEFAULT_KEY!r} in .json"
