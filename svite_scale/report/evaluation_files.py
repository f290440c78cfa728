"""What ``launch/evaluate.py`` has found of a checkpoint, read from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svite_scale.errors import RunError

NUMBERS = ("accuracy", "top5", "loss", "calibration_error", "samples")
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy on one class's samples."""

    name: str
    accuracy: float
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a checkpoint.

    Attributes:
        numbers: those of :data:`NUMBERS` that it has.
        classes: in ascending order of accuracy; those without samples are left out.
        confusion: PNG of the confusion matrix; None if there are too many classes for one.
    """

    numbers: dict[str, float]
    classes: list[ClassAccuracy]
    confusion: bytes | None


def read_evaluation(folder: Path) -> Evaluation | None:
    """Returns the evaluation in a folder; None if there is none.

    Raises:
        RunError: a file of it is damaged.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        numbers = {name: _checked(found[name]) for name in NUMBERS if name in found}
        path = folder / "per_class.json"
        classes = [_class(row) for row in json.loads(path.read_text()) if row["samples"]]
        path = folder / "confusion.png"
        confusion = path.read_bytes() if path.is_file() else None
        if confusion is not None and not confusion.startswith(PNG):
            raise ValueError("it is no PNG")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({error!r}); evaluate the checkpoint again, or remove {folder}") from error
    return Evaluation(numbers, sorted(classes, key=lambda each: each.accuracy), confusion)


def _class(row: Mapping[str, Any]) -> ClassAccuracy:
    return ClassAccuracy(str(row["name"] or row["label"]), _checked(row["accuracy"]), int(_checked(row["samples"])))


def _checked(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{str(value)[:40]!r} is no such number")
    return float(value)
