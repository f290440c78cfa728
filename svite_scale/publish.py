"""Publishing a finished run: its report and an export of its model, in the run directory and in MLflow."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from svite_scale.config.load import to_dict
from svite_scale.config.schema import Config
from svite_scale.export.model_card import CARD
from svite_scale.export.read import read_export
from svite_scale.export.write import export_run
from svite_scale.report.page import write_report
from svite_scale.saved_run import SavedRun, read_run
from svite_scale.tracking.mlflow_result import Result, log_result
from svite_scale.tracking.mlflow_run import first_line
from svite_scale.tracking.options import TrackingConfig

REPORT, EXPORT = "report", "export"
"""Folders in the run directory, and of the run in MLflow."""

logger = logging.getLogger("svite_scale")


def publish(run_dir: Path, tracking: TrackingConfig) -> None:
    """Writes the report of a run and an export of its newest checkpoint, and logs both to MLflow, with the model.

    Local: one process calls it. A failure is a warning, because the run itself has finished.

    Args:
        run_dir: of the run.
        tracking: where MLflow is. Not read from the run directory, which others may write.
    """
    try:
        _publish(run_dir, tracking)
    except Exception as error:  # MLflow passes on what its database and network raise
        cause = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("%s isn't published (%s); train it again with --resume to repeat only this", run_dir, cause)


def _publish(run_dir: Path, tracking: TrackingConfig) -> None:
    run = read_run(run_dir)
    page = write_report([run_dir], run_dir / REPORT)
    ema = prefers_average(run)
    folder = run_dir / EXPORT / f"{run.checkpoint.name}{'-ema' if ema else ''}"
    # An earlier attempt may have written it.
    if not folder.exists():
        export_run(run, form_for(run.config), folder, ema=ema)
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


def form_for(config: Config) -> str:
    """Returns the form to export: ``sliced`` if heads, neurons or tokens are absent, and otherwise ``timm``, the plainest."""
    return "sliced" if config.sparsity.is_smaller else "timm"


def prefers_average(run: SavedRun) -> bool:
    """Returns whether the moving average of the weights did better than the weights in the last evaluation of both."""
    both = [line for line in run.metrics if {"eval_accuracy", "eval_ema_accuracy"} <= line.keys()]
    return bool(both) and both[-1]["eval_ema_accuracy"] > both[-1]["eval_accuracy"]


def without_front_matter(card: str) -> str:
    """Returns a model card without the YAML at its top."""
    return card.split("---\n", 2)[2].lstrip() if card.startswith("---\n") else card
