"""Publishing a finished run: its report and an export of its model, in the run directory and in MLflow."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from svite_scale.config.load import to_dict
from svite_scale.config.schema import Config
from svite_scale.export.model_card import CARD
from svite_scale.export.read import read_export
from svite_scale.export.write import export_run
from svite_scale.report.page import write_report
from svite_scale.saved_run import SavedRun, read_run
from svite_scale.tracking.mlflow_result import Result, log_result
from svite_scale.tracking.options import TrackingConfig

REPORT, EXPORT = "report", "export"
"""Folders in the run directory, and of the run in MLflow."""


def publish(run_dir: Path, tracking: TrackingConfig) -> None:
    """Writes the report of a run and an export of its newest checkpoint, and logs both to MLflow, with the model.

    Both replace what an earlier attempt has left. Local: one process calls it.

    Args:
        run_dir: of the run.
        tracking: where MLflow is. Not read from the run directory, which others may write.

    Raises:
        SviteScaleError: the run can't be read, reported or exported.
        Exception: whatever MLflow, its database and the network raise.
    """
    run = read_run(run_dir)
    page = write_report([run_dir], run_dir / REPORT)
    ema = prefers_average(run)
    folder = run_dir / EXPORT / f"{run.checkpoint.name}{'-ema' if ema else ''}"
    write_export(run, folder, ema=ema)
    exported = read_export(folder)
    model, card = run.config.model, (folder / CARD).read_text(encoding="utf-8")
    result = Result(
        folders={REPORT: page.parent, EXPORT: folder},
        description=without_front_matter(card),
        model=exported.model,
        image_shape=(model.in_channels, model.image_size, model.image_size),
        metadata={"form": exported.form, "preprocessing": to_dict(exported.preprocessing)},
    )
    log_result(tracking, run_dir, result)
    print(f"{run_dir}: published {page} and {folder} to MLflow, with the model", file=sys.stderr)


def write_export(run: SavedRun, folder: Path, *, ema: bool) -> None:
    """Exports a run's model, and replaces a former export in the folder once the new one is complete."""
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as beside:
        new = export_run(run, form_for(run.config), Path(beside) / "new", ema=ema)
        if folder.exists():
            folder.rename(Path(beside) / "old")
        new.rename(folder)


def form_for(config: Config) -> str:
    """Returns the form to export: ``sliced`` if heads, neurons or tokens are absent, and otherwise ``timm``, the plainest."""
    return "sliced" if config.sparsity.is_smaller else "timm"


def prefers_average(run: SavedRun) -> bool:
    """Returns whether the moving average of the weights did better than the weights in the last evaluation of both."""
    both = [line for line in run.metrics if {"eval_accuracy", "eval_ema_accuracy"} <= line.keys()]
    return bool(both) and both[-1]["eval_ema_accuracy"] > both[-1]["eval_accuracy"]


def without_front_matter(card: str) -> str:
    """Returns a model card without the YAML at its top."""
    return card.split("\n---\n", 1)[1].lstrip() if card.startswith("---\n") else card
