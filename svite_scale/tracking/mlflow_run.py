"""A run in MLflow."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from svite_scale.errors import RunError
from svite_scale.tracking.backlog import Backlog, first_line
from svite_scale.tracking.options import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

QUIET = {
    # A training job should connect to nobody without being told to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # While a server doesn't answer, it holds up training. MLflow's own timeouts add up to many minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""MLflow's environment variables, where the user sets none."""

MAX_METRICS = 1000
"""Most metrics that MLflow takes in one request."""

MAX_PARAMS = 100
"""Most parameters that it takes in one request."""

RETRY_S = 60.0
"""Shortest pause in seconds after a request that failed, because each request holds up training."""

BUSY_S = 5.0
"""Longest wait in seconds for a SQLite file that another process writes to. MLflow itself would wait a minute or two."""

LOCK_S = 120.0
"""Longest wait in seconds for other runs that start at the same time. MLflow makes a database in seconds, so one of them
hangs then."""

ATTEMPTS = 5
RACE = re.compile("already exists|UNIQUE constraint")
"""Errors of MLflow when another run makes the same database or experiment at the same time."""

Status = Literal["FINISHED", "KILLED", "FAILED"]

RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}")

logger = logging.getLogger("svite_scale")


class MlflowRun:
    """A run in MLflow, by default in a SQLite file beside the run directories, which needs no server.

    Training continues whatever MLflow, its server or its database do: metrics wait in memory until they are taken. A run or an
    experiment that was deleted there is made again.

    Attributes:
        uri: MLflow's address.
        run_id: MLflow's name for the run; None until MLflow is reached.
    """

    def __init__(
        self, options: TrackingConfig, parameters: Mapping[str, object], run_dir: Path, *, resumed: bool = False
    ) -> None:
        """Resumes the run that the run directory names, or makes one.

        Args:
            options: of tracking.
            parameters: of the run, by dotted names.
            run_dir: of the run.
            resumed: the run has trained before, so a mistake in the config isn't likely: a failure is no error, but waits.

        Raises:
            RunError: this is the run's first start, and no server answers, or MLflow refuses the address or the experiment's
                name.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # They would print each failure with a traceback, and each retry.
        for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._options, self._parameters = options, parameters
        self._run_dir, self._parent = run_dir, run_dir.resolve().parent
        self._id_file = run_dir / "mlflow_run_id"
        self.uri = options.uri or f"sqlite:///{self._parent / 'mlflow.db'}"
        self._database, self._inode, self._times_lost = database_of(self.uri), 0, 0
        self._backlog: Backlog[tuple[str, float, int, int]] = Backlog("MLflow", "metrics", self._send, RETRY_S)
        self.run_id: str | None = None
        is_first_start, started = not resumed and not self._id_file.exists(), time.monotonic()
        try:
            self._connect()
        except Exception as error:  # MLflow passes on what its database and network raise
            if is_first_start:
                self._refuse_mistakes(error)
            self._backlog.postpone(error, started)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics after an optimizer step."""
        now = int(time.time() * 1000)
        self._backlog.add((name, float(value), now, step) for name, value in metrics.items())

    def end(self, status: Status) -> None:
        """Sends what waits, and the status with which the run ends; warns if that fails."""
        self._backlog.close()
        if self._backlog.waiting:
            return
        try:
            self._send().set_terminated(self.run_id, status)
        except Exception as error:
            logger.warning("MLflow doesn't know that the run is %s: %s", status, first_line(error))

    def _send(self) -> MlflowClient:
        """Sends what waits, to a new run if the old one is gone."""
        if self._is_lost():
            self._times_lost += 1
            self.run_id = None
        client = self._connect() if self.run_id is None else self._client
        check_writable(self._database)
        try:
            self._send_to(client)
        except Exception:
            if not self._is_gone(client, self.run_id):
                raise
            client = self._connect()
            self._send_to(client)
        return client

    def _send_to(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        while waiting := self._backlog.waiting:
            client.log_batch(self.run_id, [Metric(*metric) for metric in waiting[:MAX_METRICS]])
            del waiting[:MAX_METRICS]

    def _connect(self) -> MlflowClient:
        """Finds the run or makes one; tries again if another run gets in between."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with only_one(self._database):
                    check_writable(self._database)
                    return self._find_or_create()
            except Exception as error:
                if attempt == ATTEMPTS or not RACE.search(str(error)):
                    raise
                time.sleep(random.SystemRandom().uniform(0.1, 1.0))  # not a generator of training
        raise AssertionError("unreachable")

    def _find_or_create(self) -> MlflowClient:
        from mlflow import MlflowClient  # takes seconds to import

        self._client = client = MlflowClient(self._address())
        self._inode = inode_of(self._database)
        known = self._id_file.read_text(errors="replace").strip() if self._id_file.exists() else None
        if known is not None and not self._is_gone(client, known):
            client.update_run(known, status="RUNNING")
            self.run_id = known
            return client
        self.run_id = self._create(client)
        self._id_file.write_text(f"{self.run_id}\n")
        if known is not None:
            logger.warning("MLflow has no run %s any more; it continues as a new one, %s", repr(known[:40]), self.run_id)
        return client

    def _is_lost(self) -> bool:
        """Returns whether the SQLite file isn't the one that MLflow has opened."""
        return self.run_id is not None and inode_of(self._database) != self._inode

    def _address(self) -> str:
        """Returns the address for MLflow, which keeps a file open by its address even if the file is gone. The same path,
        written in another way, makes it open the new file.
        """
        if self._database is None or not self._times_lost:
            return self.uri
        folder, name = os.path.split(self._database)
        return self.uri.replace(str(self._database), os.path.join(folder, *["."] * self._times_lost, name), 1)

    def _is_gone(self, client: MlflowClient, run_id: str | None) -> bool:
        """Returns whether MLflow has no such run. An error if it doesn't answer."""
        from mlflow.exceptions import MlflowException

        if run_id is None or not RUN_ID.fullmatch(run_id):
            return True
        try:
            return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return True
            raise

    def _create(self, client: MlflowClient) -> str:
        from mlflow.entities import Param

        run_id: str = client.create_run(self._experiment(client), run_name=self._run_dir.name).info.run_id
        params = [Param(key, str(value)) for key, value in self._parameters.items()]
        for first in range(0, len(params), MAX_PARAMS):
            client.log_batch(run_id, params=params[first : first + MAX_PARAMS])
        return run_id

    def _experiment(self, client: MlflowClient) -> str:
        """Returns the experiment's id, and makes it if it is missing; under another name if it was deleted."""
        wanted = name = self._options.experiment
        number = 1
        while (found := client.get_experiment_by_name(name)) is not None and found.lifecycle_stage == "deleted":
            number += 1
            name = f"{wanted}-{number}"
        if name != wanted:
            logger.warning("MLflow's experiment %r is deleted, but keeps its name; the run goes into %r", wanted, name)
        if found is not None:
            return str(found.experiment_id)
        # Artifacts go beside the SQLite file. A server has its own place for them.
        location = None if self._options.uri else (self._parent / "mlartifacts").as_uri()
        return str(client.create_experiment(name, location))

    def _refuse_mistakes(self, error: Exception) -> None:
        """Raises an error if the config has to be corrected: its server doesn't answer, or MLflow refuses a name."""
        experiment, uri = self._options.experiment, self._options.uri
        if "experiment name" in str(error).lower():
            problem = f"tracking.experiment = {experiment!r}: MLflow refuses it ({first_line(error)}); name another"
            raise RunError(problem) from error
        if self._database is None:
            # An address may be a mistake in the config. A locked or damaged file isn't.
            remedy = "start the server or correct the address, or set tracking.mlflow=false"
            raise RunError(f"tracking.uri = {uri!r}: MLflow can't be used ({first_line(error)}); {remedy}") from error


def database_of(uri: str) -> Path | None:
    """Returns the file of a SQLite address; None for another address."""
    scheme, _, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" and path else None


def check_writable(database: Path | None) -> None:
    """Checks that a SQLite file, which may be new, can be written to now.

    Raises:
        sqlite3.Error: it can't.
    """
    if database is not None:
        with closing(sqlite3.connect(database, timeout=BUSY_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")


def inode_of(path: Path | None) -> int:
    """Returns the number that identifies a file; 0 if there is none."""
    try:
        return 0 if path is None else path.stat().st_ino
    except OSError:
        return 0


@contextmanager
def only_one(database: Path | None) -> Iterator[None]:
    """Locks a SQLite file against other runs: MLflow doesn't expect two of them to make it.

    Does without where a lock can't be had, as on some network file systems, or where another run keeps it too long.
    """
    if database is None:
        yield
        return
    try:
        descriptor = os.open(database.with_name(f"{database.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        yield
        return
    try:
        wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def wait_for_lock(descriptor: int) -> None:
    """Locks a file, or gives up after :data:`LOCK_S`."""
    end = time.monotonic() + LOCK_S
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return
        else:
            return
