"""The options of tracking."""

from __future__ import annotations

from svite_scale.options import options


@options
class TrackingConfig:
    """MLflow, beside ``metrics.jsonl`` in the run directory."""

    mlflow: bool = True
    """Logs the run to MLflow, and publishes its result there at the end."""
    uri: str | None = None
    """Address of MLflow. Null takes the environment variable ``MLFLOW_TRACKING_URI``; without that, a SQLite file
    ``mlflow.db`` in the run directory's parent."""
    experiment: str | None = None
    """Name of the experiment in MLflow. Null takes the environment variable ``MLFLOW_EXPERIMENT_NAME``; without that,
    ``svite_scale``."""
