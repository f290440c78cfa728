"""A run in MLflow: where it is, and what it is made of."""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from svite_scale.errors import RunError
from svite_scale.tracking.options import TrackingConfig
from svite_scale.tracking.sqlite_file import SqliteFile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULTS = {
    # A training job should connect to nobody without being told to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that doesn't answer holds up the start and the end of a run. MLflow's own timeouts add up to many minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # MLflow tries a model that it logs. On a GPU it couldn't: torch.export has fixed the model's device.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    # The run says once where it can be seen.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's environment variables, where the user sets none."""

RUN_ID_FILE = "mlflow_run_id"
"""File of the run directory that holds MLflow's name for the run."""

MAX_METRICS = 1000
"""Most metrics that MLflow takes in one request."""

MAX_PARAMS = 100
"""Most parameters that it takes in one request."""

ATTEMPTS = 5
RACE = re.compile("already exists|UNIQUE constraint")
"""Errors of MLflow when another run makes the same database or experiment at the same time."""

Status = Literal["FINISHED", "KILLED", "FAILED"]

Entry = tuple[str, float, int, int]
"""One value of a metric: name, value, milliseconds since 1970, optimizer step."""

RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}")

logger = logging.getLogger("svite_scale")


class Store:
    """The place of a run in MLflow: an address, and an experiment's name.

    Attributes:
        uri: the address: of the config, of ``MLFLOW_TRACKING_URI``, or of a SQLite file in the run directory's parent.
        experiment: the name: of the config, of ``MLFLOW_EXPERIMENT_NAME``, or ``svite_scale``.
        file: the SQLite file of the address; None for another address.
    """

    def __init__(self, options: TrackingConfig, run_dir: Path) -> None:
        """Sets :data:`DEFAULTS`, because MLflow reads its environment variables from here on."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        # They would print each failure with a traceback, and each retry.
        for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        by_default = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
        self.uri, self._uri_source = _first(("tracking.uri", options.uri), "MLFLOW_TRACKING_URI", by_default)
        self.experiment, self._experiment_source = _first(
            ("tracking.experiment", options.experiment), "MLFLOW_EXPERIMENT_NAME", "svite_scale"
        )
        self.file = SqliteFile.from_uri(self.uri)

    @property
    def ui_command(self) -> str:
        """How to see the runs: a server's address for a browser, otherwise the command that starts one."""
        if self.uri.startswith(("http://", "https://")):
            return f"a browser at {self.uri}"
        return f"mlflow ui --backend-store-uri {self.uri}"

    @property
    def artifact_location(self) -> str | None:
        """Where files of a new experiment go: beside the SQLite file. None leaves it to a server."""
        return None if self.file is None else (self.file.path.resolve().parent / "mlartifacts").as_uri()

    def refuse_mistakes(self, error: Exception) -> None:
        """Raises an error if the user has to correct something: no server answers, or MLflow refuses a name.

        Raises:
            RunError: names what the user gave.
        """
        if "experiment name" in str(error).lower():
            given = f"{self._experiment_source} = {self.experiment!r}"
            raise RunError(f"{given}: MLflow refuses it ({first_line(error)}); name another") from error
        if self.file is None:
            # An address may be a mistake. A locked or damaged file isn't.
            remedy = "start the server or correct the address, or set tracking.mlflow=false"
            problem = f"{self._uri_source} = {self.uri!r}: MLflow can't be used ({first_line(error)}); {remedy}"
            raise RunError(problem) from error


class MlflowRun:
    """One run in MLflow. Its calls wait for MLflow; :class:`~svite_scale.tracking.mlflow_queue.MlflowQueue` makes them in a
    thread of its own.

    A run or an experiment that was deleted there is made again.

    Attributes:
        run_id: MLflow's name for the run; None until MLflow is reached.
    """

    def __init__(self, store: Store, run_dir: Path, parameters: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Remembers what to log; makes no connection.

        Args:
            store: where the run goes.
            run_dir: of the run; its ``config.yaml`` is logged as it is.
            parameters: of the run, by dotted names.
            tags: of this start of the run, by name.
        """
        self.store, self._run_dir, self._parameters, self._tags = store, run_dir, parameters, tags
        self._id_file = run_dir / RUN_ID_FILE
        self.run_id: str | None = None

    def connect(self) -> None:
        """Finds the run that the run directory names, or makes one; tries again if another run gets in between."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self.store.file.locked() if self.store.file else nullcontext():
                    self._check_writable()
                    self._find_or_create()
                return
            except Exception as error:
                if attempt == ATTEMPTS or not RACE.search(str(error)):
                    raise
                time.sleep(random.SystemRandom().uniform(0.1, 1.0))  # not a generator of training

    def send(self, entries: Sequence[Entry]) -> None:
        """Logs at most :data:`MAX_METRICS` values, to a new run if the old one is gone."""
        self._reconnect_if_lost()
        try:
            self._log(entries)
        except Exception:
            if not self._is_gone(self.run_id):
                raise
            self.connect()
            self._log(entries)

    def terminate(self, status: Status) -> None:
        """Logs the status with which the run ends."""
        self._reconnect_if_lost()
        self._client.set_terminated(self.run_id, status)

    def _log(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.run_id, [Metric(*entry) for entry in entries])

    def _reconnect_if_lost(self) -> None:
        """Connects for the first time, or again after the SQLite file was deleted or replaced."""
        file = self.store.file
        if self.run_id is None or (file is not None and file.is_lost()):
            self.run_id = None
            self.connect()
        self._check_writable()

    def _check_writable(self) -> None:
        if self.store.file is not None:
            self.store.file.check_writable()

    def _find_or_create(self) -> None:
        from mlflow import MlflowClient

        file = self.store.file
        self._client: MlflowClient = MlflowClient(self.store.uri if file is None else file.address())
        if file is not None:
            file.opened()
        known = self._id_file.read_text(errors="replace").strip() if self._id_file.exists() else None
        run = self._find(known)
        if run is None:
            run = self._client.create_run(self._find_experiment(), run_name=self._run_dir.name)
            self._id_file.write_text(f"{run.info.run_id}\n")
            if known is not None:
                message = "MLflow has no run %s any more; it continues as a new one, %s"
                logger.warning(message, repr(known[:40]), run.info.run_id)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._describe(run)
        self.run_id = run.info.run_id

    def _describe(self, run: Run) -> None:
        """Logs tags and config of this start, and the parameters that MLflow lacks: it never changes one."""
        from mlflow.entities import Param, RunTag

        run_id, known = run.info.run_id, run.data.params
        params = [Param(name, str(value)) for name, value in self._parameters.items() if name not in known]
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MAX_PARAMS])
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in self._tags.items()])
        try:
            self._client.log_artifact(run_id, str(self._run_dir / "config.yaml"))
        except Exception as error:  # the place of a server's files may be away while its database works
            logger.warning("MLflow doesn't take config.yaml (%s); the run continues", first_line(error))

    def _find(self, run_id: str | None) -> Run | None:
        """Returns MLflow's run of a name; None if it has none, or a deleted one. An error if it doesn't answer."""
        from mlflow.exceptions import MlflowException

        if run_id is None or not RUN_ID.fullmatch(run_id):
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return None if run.info.lifecycle_stage == "deleted" else run

    def _is_gone(self, run_id: str | None) -> bool:
        return self._find(run_id) is None

    def _find_experiment(self) -> str:
        """Returns the experiment's id, and makes it if it is missing; under another name if it was deleted."""
        wanted = name = self.store.experiment
        number = 1
        while (found := self._client.get_experiment_by_name(name)) is not None and found.lifecycle_stage == "deleted":
            number += 1
            name = f"{wanted}-{number}"
        if name != wanted:
            logger.warning("MLflow's experiment %r is deleted, but keeps its name; the run goes into %r", wanted, name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, self.store.artifact_location))


def _first(option: tuple[str, str | None], variable: str, default: str) -> tuple[str, str]:
    """Returns the first value that is given, of an option, an environment variable and a default, and its source's name."""
    name, value = option
    if value is not None:
        return value, name
    if found := os.environ.get(variable):
        return found, variable
    return default, name


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that says something."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    return lines[0] if lines else type(error).__name__
