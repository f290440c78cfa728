"""The queue of metrics for MLflow: no step waits, nothing is lost or sent twice, and memory is bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import pytest

from svite_scale.errors import RunError
from svite_scale.tracking import mlflow_queue
from svite_scale.tracking.mlflow_queue import MlflowQueue
from svite_scale.tracking.mlflow_run import Entry, Status
from tests.waiting import wait_until

pytestmark = pytest.mark.slow  # importing MLflow starts a process


class StandIn:
    """A run in an MLflow that fails or hangs as a test wants.

    Attributes:
        error: raised by every call, if set.
        answers: cleared, it makes every call hang.
    """

    def __init__(self) -> None:
        self.store = self
        self.run_id: str | None = None
        self.error: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.steps: list[int] = []
        self.calls = 0
        self.status: Status | None = None

    def _call(self) -> None:
        self.calls += 1
        self.answers.wait(120)
        if self.error:
            raise self.error

    def connect(self) -> None:
        self._call()
        self.run_id = "a"

    def send(self, entries: Sequence[Entry]) -> None:
        self._call()
        self.steps += [step for *_, step in entries]

    def terminate(self, status: Status) -> None:
        self._call()
        self.status = status

    def refuse_mistakes(self, error: Exception) -> None:
        raise RunError("no such server") from error


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    stand_in = StandIn()
    yield stand_in
    stand_in.answers.set()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "svite_scale"]


def queue_of(run: StandIn, *, first_start: bool = False) -> MlflowQueue:
    return MlflowQueue(run, first_start=first_start)  # type: ignore[arg-type]


def test_log_returns_while_mlflow_hangs(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    run.answers.clear()
    queue = queue_of(run)
    for step in range(2500):
        queue.log(step, {"loss": 1.0})
    assert run.steps == []
    run.answers.set()
    queue.end("FINISHED")
    assert run.steps == list(range(2500))
    assert run.status == "FINISHED"
    assert warnings() == []


def test_values_wait_while_mlflow_fails_and_are_sent_once(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    queue = queue_of(run)
    queue.log(1, {"loss": 1.0})
    wait_until(lambda: run.steps == [1])
    with patch.object(mlflow_queue, "RETRY_S", 0.01):
        run.error = OSError("the server is away\nmore")
        before = run.calls
        queue.log(2, {"loss": 1.0})
        queue.log(3, {"loss": 1.0})
        wait_until(lambda: run.calls > before + 3)
        run.error = None
        wait_until(lambda: run.steps == [1, 2, 3])
        queue.end("KILLED")
    assert (run.steps, run.status) == ([1, 2, 3], "KILLED")
    assert warnings() == ["MLflow doesn't take metrics (the server is away); they wait until it does, and the run continues"]


def test_a_failed_attempt_is_not_repeated_at_once_but_at_the_end(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    run.error = OSError("away")
    queue = queue_of(run)
    wait_until(lambda: warnings())
    for step in range(100):
        queue.log(step, {"loss": 1.0})
    assert run.calls == 1
    run.error = None
    queue.end("FINISHED")
    assert (run.steps, run.status) == (list(range(100)), "FINISHED")


def test_end_warns_of_what_mlflow_lacks(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    run.error = OSError("away")
    queue = queue_of(run)
    queue.log(1, {"loss": 1.0, "density": 0.3})
    queue.end("FINISHED")
    assert warnings()[-1] == "MLflow lacks 2 metrics: away"


def test_end_gives_up_when_mlflow_hangs(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    run.answers.clear()
    queue = queue_of(run)
    queue.log(1, {"loss": 1.0})
    with patch.object(mlflow_queue, "END_S", 0.05):
        queue.end("FINISHED")
    assert warnings() == ["MLflow lacks 1 metrics: it doesn't answer"]


def test_end_warns_when_the_status_is_lost(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    queue = queue_of(run)
    queue.log(1, {"loss": 1.0})
    wait_until(lambda: run.steps == [1])
    run.error = OSError("away")
    queue.end("FAILED")
    assert warnings() == ["MLflow doesn't know that the run is FAILED: away"]


def test_the_newest_values_wait_when_there_are_too_many(run: StandIn, warnings: Callable[[], list[str]]) -> None:
    run.answers.clear()
    with patch.object(mlflow_queue, "MAX_WAITING", 10):
        queue = queue_of(run)
        for step in range(25):
            queue.log(step, {"loss": 1.0})
        run.answers.set()
        queue.end("FINISHED")
    assert run.steps == list(range(15, 25))
    assert warnings() == ["MLflow lacks 15 metrics: more than 10 waited"]


def test_only_a_first_start_fails_with_mlflow(run: StandIn) -> None:
    run.error = OSError("away")
    with pytest.raises(RunError, match="no such server"):
        queue_of(run, first_start=True)
    queue_of(run).end("FINISHED")
