"""The run in MLflow."""

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
from svite_scale.tracking.options import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

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

PARAMS_AT_ONCE = 100
"""The same of parameters."""

RETRY_S = 60.0
"""Seconds in which MLflow isn't asked again after it hasn't answered, for each question holds up training."""

RETRY_RATIO = 10
"""The same as a multiple of how long the question took."""

BUSY_S = 5.0
"""Longest wait for a SQLite file that another process writes to. MLflow would wait for one that it can't open or write to for
the better part of a minute, or two."""

LOCK_S = 120.0
"""Longest wait for others that start at the same time. MLflow makes a database in seconds, so one of them hangs then."""

ATTEMPTS = 5
RACE = re.compile("already exists|UNIQUE constraint")
"""What MLflow says where somebody else makes the same database or experiment at the same time."""

Status = Literal["FINISHED", "KILLED", "FAILED"]

RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}")

logger = logging.getLogger("svite_scale")


class MlflowRun:
    """By default it is in a SQLite file beside the run directories, which needs no server.

    What a server or file doesn't take waits in memory, and is sent with what comes next: training goes on, whatever MLflow, its
    server or its database do. A run or an experiment that was deleted there is begun anew.

    Attributes:
        uri: where it is.
        run_id: MLflow's name for the run; None as long as MLflow couldn't be reached.
    """

    def __init__(
        self, options: TrackingConfig, parameters: Mapping[str, object], run_dir: Path, *, resumed: bool = False
    ) -> None:
        """Goes on with the run that the run directory names, or makes one.

        Args:
            options: of tracking.
            parameters: of the run, by dotted names.
            run_dir: of the run.
            resumed: the run has trained before, so that a mistake in the config isn't likely: what fails is tried again later.

        Raises:
            RunError: no server answers, or MLflow refuses the address or the experiment's name, at a run's first start.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # They print what is raised too, with its traceback, and each time that a server is asked again.
        for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._options, self._parameters = options, parameters
        self._run_dir, self._parent = run_dir, run_dir.resolve().parent
        self._id_file = run_dir / "mlflow_run_id"
        self.uri = options.uri or f"sqlite:///{self._parent / 'mlflow.db'}"
        self._database, self._inode, self._times_lost = database_of(self.uri), 0, 0
        self._waiting: list[tuple[str, float, int, int]] = []
        self._ask_at = 0.0
        self._is_told = False
        self.run_id: str | None = None
        is_first_start, asked_at = not resumed and not self._id_file.exists(), time.monotonic()
        try:
            self._connect()
        except Exception as error:  # MLflow lets through what its database and its network raise
            if is_first_start:
                self._refuse_mistakes(error)
            self._put_off(error, asked_at)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after an optimizer step."""
        now = int(time.time() * 1000)
        self._waiting += [(name, float(value), now, step) for name, value in metrics.items()]
        asked_at = time.monotonic()
        if asked_at < self._ask_at:
            return
        try:
            self._send()
        except Exception as error:
            self._put_off(error, asked_at)

    def end(self, status: Status) -> None:
        """Sends what waits, and how the run has ended."""
        try:
            client = self._send()
            client.set_terminated(self.run_id, status)
        except Exception as error:
            lost = f"lacks the last {len(self._waiting)} metrics" if self._waiting else f"doesn't know that the run is {status}"
            logger.warning("MLflow %s: %s", lost, first_line(error))

    def _put_off(self, error: Exception, asked_at: float) -> None:
        now = time.monotonic()
        self._ask_at = now + max(RETRY_S, RETRY_RATIO * (now - asked_at))
        if not self._is_told:
            logger.warning("MLflow doesn't take metrics (%s); they wait until it does, and the run goes on", first_line(error))
        self._is_told = True

    def _send(self) -> MlflowClient:
        """Sends what waits, to a new run where the old one is gone."""
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
        self._is_told = False
        return client

    def _send_to(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        while self._waiting:
            client.log_batch(self.run_id, [Metric(*metric) for metric in self._waiting[:AT_ONCE]])
            del self._waiting[:AT_ONCE]

    def _connect(self) -> MlflowClient:
        """Finds the run, or makes one, as often as others get in between."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with only_one(self._database):
                    check_writable(self._database)
                    return self._find_or_create()
            except Exception as error:
                if attempt == ATTEMPTS or not RACE.search(str(error)):
                    raise
                time.sleep(random.SystemRandom().uniform(0.1, 1.0))  # not the generators that belong to training
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
            logger.warning("MLflow has no run %s any more; it goes on as a new one, %s", repr(known[:40]), self.run_id)
        return client

    def _is_lost(self) -> bool:
        """Whether the SQLite file isn't the one that MLflow has opened."""
        return self.run_id is not None and inode_of(self._database) != self._inode

    def _address(self) -> str:
        """Where MLflow is to look. It keeps files open by their addresses, also when they are gone: another way to write the
        address opens what is there now.
        """
        if self._database is None or not self._times_lost:
            return self.uri
        folder, name = os.path.split(self._database)
        return self.uri.replace(str(self._database), os.path.join(folder, *["."] * self._times_lost, name), 1)

    def _is_gone(self, client: MlflowClient, run_id: str | None) -> bool:
        """Whether MLflow answers, and has no such run."""
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
        for first in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(run_id, params=params[first : first + PARAMS_AT_ONCE])
        return run_id

    def _experiment(self, client: MlflowClient) -> str:
        """The experiment of the config, made where it isn't there; under another name where it was deleted."""
        wanted = name = self._options.experiment
        number = 1
        while (found := client.get_experiment_by_name(name)) is not None and found.lifecycle_stage == "deleted":
            number += 1
            name = f"{wanted}-{number}"
        if name != wanted:
            logger.warning("MLflow's experiment %r is deleted, but keeps its name; the run goes into %r", wanted, name)
        if found is not None:
            return str(found.experiment_id)
        # Artifacts go beside the SQLite file; a server of the user's own has its own place for them.
        location = None if self._options.uri else (self._parent / "mlartifacts").as_uri()
        return str(client.create_experiment(name, location))

    def _refuse_mistakes(self, error: Exception) -> None:
        """Ends a start where the config has to be mended: its server doesn't answer, or MLflow refuses a name."""
        experiment, uri = self._options.experiment, self._options.uri
        if "experiment name" in str(error).lower():
            problem = f"tracking.experiment = {experiment!r}: MLflow refuses it ({first_line(error)}); name another"
            raise RunError(problem) from error
        if self._database is None:
            # Its address may be a mistake; a file that is locked or damaged isn't one of the config.
            remedy = "start the server or correct the address, or set tracking.mlflow=false"
            raise RunError(f"tracking.uri = {uri!r}: MLflow can't be used ({first_line(error)}); {remedy}") from error


def database_of(uri: str) -> Path | None:
    """The file of a SQLite address; None for another one."""
    scheme, _, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" and path else None


def check_writable(database: Path | None) -> None:
    """Looks whether a SQLite file, which may be new, can be written to now.

    Raises:
        sqlite3.Error: it can't.
    """
    if database is not None:
        with closing(sqlite3.connect(database, timeout=BUSY_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")


def inode_of(path: Path | None) -> int:
    """By which a file is known; 0 where there is none."""
    try:
        return 0 if path is None else path.stat().st_ino
    except OSError:
        return 0


@contextmanager
def only_one(database: Path | None) -> Iterator[None]:
    """Keeps other runs waiting that come to the same SQLite file: MLflow doesn't expect two to make one.

    Where there can't be a lock, on some file systems of networks say, or another run doesn't let go of it, it does without.
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


def first_line(error: Exception) -> str:
    """The first line of a message that says something."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    return lines[0] if lines else type(error).__name__
