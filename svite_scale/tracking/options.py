"""The options of tracking."""

from __future__ import annotations

from svite_scale.options import options


@options
class TrackingConfig:
    """MLflow, beside ``metrics.jsonl`` in the run directory."""

    mlflow: bool = True
    """Log the run to MLflow."""
    publish: bool = True
    """Log a report, an export and a loadable model to MLflow when the run has finished."""
    uri: str | None = None
    """Address of MLflow. Null takes the environment variable ``MLFLOW_TRACKING_URI``; without that, a SQLite file
    ``mlflow.db`` in the run directory's parent."""
    experiment: str | None = None
    """MLflow's experiment that the run belongs to. Null takes the environment variable ``MLFLOW_EXPERIMENT_NAME``; without
    that, ``svite_scale``."""
