"""The way of metrics to MLflow, beside training."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

from svite_scale.tracking.mlflow_run import MAX_METRICS, Entry, MlflowRun, Status, first_line
from svite_scale.tracking.system_metrics import SystemMetrics

MAX_WAITING = 100_000
"""Most values that wait in memory, about 20 MB. The oldest make room for new ones; ``metrics.jsonl`` has them."""

RETRY_S = 60.0
"""Pause in seconds after a failed attempt."""

END_S = 30.0
"""Longest wait in seconds at the end of a run for what MLflow lacks."""

logger = logging.getLogger("svite_scale")


class MlflowQueue:
    """Sends metrics to MLflow in a thread of its own, so that no optimizer step waits for MLflow, its server or its database.

    Values that MLflow doesn't take wait in memory until it does. A second thread measures the machine.
    """

    def __init__(self, run: MlflowRun, *, first_start: bool) -> None:
        """Starts to send.

        Args:
            run: owned by the thread from here on.
            first_start: the run has never trained. Then a mistake is likely, so MLflow must be reached before anything else.

        Raises:
            RunError: this is the first start, and no server answers, or MLflow refuses a name.
        """
        # Imported here, which takes seconds: loader processes are forked later, and no import should be under way then.
        import mlflow.entities  # noqa: F401

        self._run = run
        if first_start:
            try:
                run.connect()
            except Exception as error:  # MLflow passes on what its database and network raise
                run.store.refuse_mistakes(error)
        self._waiting: deque[Entry] = deque(maxlen=MAX_WAITING)
        self._batch: list[Entry] = []
        self._step = self._num_added = self._num_sent = 0
        self._adding = threading.Lock()
        self._status: Status | None = None
        self._has_work, self._ends = threading.Event(), threading.Event()
        self._error: Exception | None = None
        # It connects at once, also if there is nothing to send yet.
        self._has_work.set()
        self._thread = threading.Thread(target=self._work, name="MLflow", daemon=True)
        self._thread.start()
        self._system = SystemMetrics(self._log)

    @property
    def ui_command(self) -> str:
        """See :attr:`~svite_scale.tracking.mlflow_run.Store.ui_command`."""
        return self._run.store.ui_command

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics after an optimizer step. Waits for nothing."""
        self._step = step
        self._log(metrics)

    def end(self, status: Status) -> None:
        """Sends what waits, and the status with which the run ends; warns of what MLflow lacks after :data:`END_S`."""
        self._system.stop()
        self._status = status
        self._ends.set()
        self._has_work.set()
        self._thread.join(END_S)
        cause = "it doesn't answer" if self._thread.is_alive() else self._error and first_line(self._error)
        if lacking := self._num_added - self._num_sent:
            logger.warning("MLflow lacks %d metrics: %s", lacking, cause or f"more than {MAX_WAITING} waited")
        elif cause:
            logger.warning("MLflow doesn't know that the run is %s: %s", status, cause)

    def _log(self, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        entries = [(name, float(value), now, self._step) for name, value in metrics.items()]
        with self._adding:
            self._num_added += len(entries)
            self._waiting.extend(entries)
        self._has_work.set()

    def _work(self) -> None:
        """Sends what waits whenever there is something, until the run ends."""
        is_last = False
        while not is_last:
            self._has_work.wait()
            self._has_work.clear()
            is_last = self._ends.is_set()
            try:
                self._send_all()
                self._error = None
            except Exception as error:  # a server's library may raise anything
                self._warn_of(error)
                self._error = error
                self._has_work.set()
                self._ends.wait(RETRY_S)

    def _send_all(self) -> None:
        if self._run.run_id is None:
            self._run.connect()
        while self._take_batch():
            self._run.send(self._batch)
            self._num_sent += len(self._batch)
            self._batch = []
        if self._status is not None:
            self._run.terminate(self._status)

    def _take_batch(self) -> bool:
        """Takes the oldest values off the queue, unless a batch is left from a failed attempt. False if there is none."""
        while len(self._batch) < MAX_METRICS and self._waiting:
            self._batch.append(self._waiting.popleft())
        return bool(self._batch)

    def _warn_of(self, error: Exception) -> None:
        """Warns of the first failure in a row."""
        if self._error is None and not self._ends.is_set():
            problem = f"MLflow doesn't take metrics ({first_line(error)})"
            logger.warning("%s; they wait until it does, and the run continues", problem)
