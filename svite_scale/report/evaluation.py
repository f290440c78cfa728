"""What ``launch/evaluate.py`` has found of a checkpoint: its files, and their section of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svite_scale.data.format.files import read_regular
from svite_scale.errors import RunError
from svite_scale.report import numbers
from svite_scale.report.charts import Format, table
from svite_scale.report.html import join, tag
from svite_scale.report.section import Pictures, Runs, Section, of_run
from svite_scale.saved_run import SavedRun

LABELS: dict[str, tuple[str, Format]] = {
    "accuracy": ("accuracy", numbers.percent),
    "top5": ("top 5", numbers.percent),
    "calibration_error": ("calibration error", numbers.percent),
    "loss": ("loss", numbers.plain),
    "samples": ("samples", numbers.plain),
}
"""The numbers of an evaluation that are shown, with their labels and formats."""

HARDEST = 10
"""Number of classes that are named."""

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
        numbers: those of :data:`LABELS` that it has; None for one that isn't finite.
        source: the data and the labels that they are of, as a sentence.
        classes: in ascending order of accuracy; those without samples are left out.
        confusion: PNG of the confusion matrix; None if there are too many classes for one.
    """

    numbers: dict[str, float | None]
    source: str
    classes: list[ClassAccuracy]
    confusion: bytes | None


def read_evaluation(run: SavedRun, *, ema: bool) -> Evaluation | None:
    """Returns the evaluation of a run's checkpoint, or of its moving average; None if there is none.

    Raises:
        RunError: a file of it is damaged.
    """
    found = run.evaluation(ema=ema)
    if found is None:
        return None
    folder = run.evaluation_folder(ema=ema)
    path = folder / "evaluation.json"
    try:
        numbers = {name: None if found[name] is None else _checked(found[name]) for name in LABELS if name in found}
        source = _source(found)
        path = folder / "per_class.json"
        classes = [_class(row) for row in json.loads(read_regular(path)) if row["samples"]]
        path = folder / "confusion.png"
        confusion = path.read_bytes() if path.is_file() else None
        if confusion is not None and not confusion.startswith(PNG):
            raise ValueError("it is no PNG")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({error!r}); evaluate the checkpoint again, or remove {folder}") from error
    return Evaluation(numbers, source, sorted(classes, key=lambda each: each.accuracy), confusion)


def _class(row: Mapping[str, Any]) -> ClassAccuracy:
    return ClassAccuracy(str(row["name"] or row["label"]), _checked(row["accuracy"]), int(_checked(row["samples"])))


def _source(found: Mapping[str, Any]) -> str:
    """Returns which data and labels an evaluation is of, as a sentence."""
    labels = f"the labels of {found['labels']}" if found.get("labels") else "the labels of the shards"
    label_map = f" and the label map {found['label_map']}" if found.get("label_map") else ""
    return f"Measured on {found['data']}, with {labels}{label_map}."


def _checked(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{str(value)[:40]!r} is no such number")
    return float(value)


def _shown(value: float | None, show: Format) -> str:
    return "not finite" if value is None else show(value)


def evaluation(runs: Runs, pictures: Pictures) -> Section | None:
    """Returns what ``launch/evaluate.py`` has found of the runs' checkpoints, of the weights and of their moving average."""
    parts = []
    for run_number, run in enumerate(runs, start=1):
        for ema in (False, True):
            found = read_evaluation(run.saved, ema=ema) if run.saved else None
            if found is None:
                continue
            rows = [
                [label, _shown(found.numbers[name], show)] for name, (label, show) in LABELS.items() if name in found.numbers
            ]
            note = tag("div", found.source, class_="note")
            shown = [tag("div", tag("h3", "All samples"), note, table([], rows), class_="card")]
            if found.classes:
                rows = [[each.name, numbers.percent(each.accuracy), f"{each.samples:,}"] for each in found.classes[:HARDEST]]
                hardest = table(["", "accuracy", "samples"], rows)
                shown.append(tag("div", tag("h3", "Hardest classes"), hardest, class_="card"))
            if found.confusion is not None:
                name = f"run{run_number}-confusion{'-ema' * ema}.png"
                picture = pictures.add(name, found.confusion, "confusion matrix", class_="whole")
                shown.append(tag("div", tag("h3", "Confusion"), picture, class_="card"))
            head = [tag("h4", of_run(runs, run) + ("moving average" if ema else "weights"))] if ema or len(runs) > 1 else []
            parts += [*head, tag("div", *shown, class_="tables")]
    return Section("Evaluation", join(*parts), "By launch/evaluate.py, of the checkpoint.") if parts else None
