"""The run in MLflow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from svite_scale.config import Config
from svite_scale.config_reader import flatten_config, to_dict
from svite_scale.errors import RunError

QUIET = {
    # A training job should speak to nobody it wasn't told to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that doesn't answer holds up training while it is asked; MLflow's own patience is many minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""What MLflow's environment says where the user's says nothing."""

AT_ONCE = 1000
"""Metrics that MLflow takes in one request."""

RETRY_S = 60.0
"""Seconds in which MLflow isn't asked again after it hasn't answered, for each question holds up training."""

logger = logging.getLogger("svite_scale")


class MlflowRun:
    """By default it is in a SQLite file beside the run directories, which needs no server.

    What a server or file doesn't take waits in memory, and is sent with what comes next: training goes on.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        """Goes on with the run that the run directory names, or makes one.

        Raises:
            RunError: MLflow can't be used.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import mlflow  # takes seconds to import
        from mlflow.exceptions import MlflowException

        # It prints what it raises too, with its traceback.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self._error = MlflowException
        self._waiting: list[mlflow.entities.Metric] = []
        self._ask_at = 0.0
        parent = run_dir.resolve().parent
        self.uri = config.tracking.uri or f"sqlite:///{parent / 'mlflow.db'}"
        try:
            self.client = mlflow.MlflowClient(self.uri)
            self.run_id = self._resume_or_create(config, run_dir, parent)
        except MlflowException as error:
            remedy = "start the server or correct the address, or set tracking.mlflow=false"
            raise RunError(
                f"tracking.uri = {config.tracking.uri!r}: MLflow can't be used ({first_line(error)}); {remedy}"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after an optimizer step."""
        from mlflow.entities import Metric

        now, is_first = int(time.time() * 1000), not self._waiting
        self._waiting += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() < self._ask_at:
            return
        try:
            self._send()
        except self._error as error:
            self._ask_at = time.monotonic() + RETRY_S
            if is_first:
                logger.warning(
                    "MLflow doesn't take metrics (%s); they wait until it does, and the run goes on", first_line(error)
                )

    def end(self, status: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        """Sends what waits, and how the run has ended."""
        try:
            self._send()
            self.client.set_terminated(self.run_id, status)
        except self._error as error:
            lost = f"lacks the last {len(self._waiting)} metrics" if self._waiting else f"doesn't know that the run is {status}"
            logger.warning("MLflow %s: %s", lost, first_line(error))

    def _send(self) -> None:
        while self._waiting:
            self.client.log_batch(self.run_id, self._waiting[:AT_ONCE])
            del self._waiting[:AT_ONCE]

    def _resume_or_create(self, config: Config, run_dir: Path, parent: Path) -> str:
        id_file = run_dir / "mlflow_run_id"
        if id_file.exists():
            run_id = id_file.read_text().strip()
            self.client.update_run(run_id, status="RUNNING")
            return run_id
        run_id = self._create(config, run_dir, parent)
        id_file.write_text(run_id + "\n")
        return run_id

    def _create(self, config: Config, run_dir: Path, parent: Path) -> str:
        name = config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        # Artifacts go beside the SQLite file; a server of the user's own has its own place for them.
        location = None if config.tracking.uri else (parent / "mlartifacts").as_uri()
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name, location)
        run_id: str = self.client.create_run(experiment_id, run_name=run_dir.name).info.run_id
        for key, value in flatten_config(to_dict(config)).items():
            self.client.log_param(run_id, key, value)
        return run_id


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
