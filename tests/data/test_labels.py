"""Lists of classes and of labels: errors name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from svite_scale.data.format.labels import parse_label, read_classes, read_labels
from svite_scale.errors import DataError

CLASSES = {"n01": 0, "n02": 1}


def test_lists_of_classes_and_labels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("n02\n n01 \ntench, Tinca\n\n\n")
    assert read_classes(path) == {"n02": 0, "n01": 1, "tench, Tinca": 2}
    path.write_text("b.JPEG 7\nfolder/a b.png   12\nc.jpg\t0\n")
    assert read_labels(path, None) == [("b.JPEG", 7), ("folder/a b.png", 12), ("c.jpg", 0)]
    path.write_text("b.JPEG n02\nc.JPEG 0\n")
    assert read_labels(path, CLASSES) == [("b.JPEG", 1), ("c.JPEG", 0)]


@pytest.mark.parametrize(
    ("value", "classes", "label"),
    [
        (7, None, 7),
        (" 7\n", None, 7),
        (10**9, None, None),
        (-1, None, None),
        (True, None, None),
        (1.0, None, 1),
        ("3.0", None, 3),
        ("3.", None, 3),
        (3.5, None, None),
        ("3.5", None, None),
        ("3e0", None, None),
        (float("nan"), None, None),
        ("\u0663", None, None),
        ("3.0", {"3.0": 0}, 0),
        ("n02", CLASSES, 1),
        ("n02", None, None),
        ("1", CLASSES, 1),
        (1, CLASSES, 1),
        ("2", CLASSES, None),
        (57, CLASSES, None),
        ("20", {"10": 0, "20": 1}, 1),
        (20, {"10": 0, "20": 1}, 1),
        (1, {"1": 0, "0": 1}, 0),
    ],
)
def test_a_label_is_a_number_or_a_name(value: object, classes: dict[str, int] | None, label: int | None) -> None:
    """A class may have a number as its name, which counts before the class of that number."""
    assert parse_label(value, classes) == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("a\n\nb\n", "line 2 is ''"),
        ("a\nb/c\n", "line 2 is 'b/c'"),
        (".\n", "line 1 is '.'; write the name of one class folder"),
        ("a\n..\n", "line 2 is '..'"),
        ("a\nb\na\n", "line 3: 'a' is on line 1 too"),
    ],
)
def test_bad_lists_of_classes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"classes.txt.*{message}"):
        read_classes(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no file"),
        ("a.jpg 1\nb.jpg\n", r"line 2 is 'b\.jpg'; .* a class number from 0, or give the classes' names with --classes"),
        ("a.jpg 1\n\nb.jpg 2\n", "line 2 is ''"),
        ("a.jpg 1\nb.jpg n01\n", "line 2 is 'b.jpg n01'"),
        ("a.jpg -1\n", "line 1"),
        ("a.jpg 1\nb.jpg 1\na.jpg 2\n", "line 3: 'a.jpg' is listed twice"),
    ],
)
def test_bad_lists_of_labels_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "val.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"val\.txt.*{message}"):
        read_labels(path, None)


def test_an_unreadable_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("nowhere", "binary"):
        with pytest.raises(DataError, match=rf"{name} can't be read"):
            read_classes(tmp_path / name)
    (tmp_path / "labels").write_text("a.jpg n03\n")
    with pytest.raises(DataError, match="a class, or its number from 0 to 1"):
        read_labels(tmp_path / "labels", CLASSES)
