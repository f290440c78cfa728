"""The options of tracking."""

from __future__ import annotations

from svite_scale.options import options


@options
class TrackingConfig:
    """MLflow, beside ``metrics.jsonl`` in the run directory."""

    mlflow: bool = True
    """Record the run in MLflow."""
    uri: str | None = None
    """Null is a SQLite file in the run directory's parent."""
    experiment: str = "svite_scale"
    """MLflow's experiment that the run belongs to."""
