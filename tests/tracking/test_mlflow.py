"""Runs whose MLflow is shared, damaged, deleted or away: training continues."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from svite_scale.config.schema import Config
from svite_scale.errors import RunError
from svite_scale.tracking import mlflow_run
from svite_scale.tracking.options import TrackingConfig
from tests.ranks import free_port
from tests.runs import metrics_of
from tests.tracking.trackers import tracker_of


def started(folder: Path, number: int, experiment: str, together: Any, answers: Any) -> None:
    import mlflow  # noqa: F401 - before the others are waited for, so that all come to the database at once

    run_dir = folder / f"{experiment}-{number}"
    config = Config(run_dir=str(run_dir), tracking=TrackingConfig(experiment=experiment))
    together.wait(120)
    try:
        with tracker_of(config, run_dir, None) as tracker:
            tracker.log(1, {"loss": float(number)})
        answers.put("")
    except BaseException as error:
        answers.put(repr(error))


def test_runs_can_start_at_the_same_time_in_an_empty_folder(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    context = multiprocessing.get_context("spawn")
    together, answers = context.Barrier(4), context.Queue()
    jobs = [context.Process(target=started, args=(tmp_path, number, "new", together, answers)) for number in range(4)]
    try:
        for job in jobs:
            job.start()
        assert [answers.get(timeout=240) for _ in jobs] == [""] * 4
    finally:
        for job in jobs:
            job.kill()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("new").experiment_id])
    assert sorted(run.data.metrics["loss"] for run in runs) == [0, 1, 2, 3]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_mlflow_gets_a_new_run_when_the_old_one_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run, an experiment, the file, and the name of the run, one after another, while training continues."""
    from mlflow import MlflowClient

    database, run_dir = tmp_path / "mlflow.db", tmp_path / "run"
    client = MlflowClient(f"sqlite:///{database}")
    config = Config(run_dir=str(run_dir), tracking=TrackingConfig(experiment="digits"))

    def run_id() -> str:
        return (run_dir / "mlflow_run_id").read_text().strip()

    with tracker_of(config, run_dir, None) as tracker:
        tracker.log(1, {"loss": 1.0})
        client.delete_run(run_id())
        tracker.log(2, {"loss": 2.0})
        assert [entry.step for entry in client.get_metric_history(run_id(), "loss")] == [2]
        client.delete_experiment(client.get_run(run_id()).info.experiment_id)
        tracker.log(3, {"loss": 3.0})
        assert [entry.step for entry in client.get_metric_history(run_id(), "loss")] == [3]
        assert client.get_experiment(client.get_run(run_id()).info.experiment_id).name == "digits-2"
    (run_dir / "mlflow_run_id").write_bytes(b"\xff../../elsewhere")
    with tracker_of(config, run_dir, 3) as tracker:
        database.unlink()
        tracker.log(4, {"loss": 4.0})
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT run_uuid, step FROM metrics").fetchall() == [(run_id(), 4)]
    lines = [record.getMessage() for record in caplog.records if record.name == "svite_scale"]
    assert [line.partition(" any more; it continues as a new one, ")[0].partition(" run '")[0] for line in lines] == [
        "MLflow has no",
        "MLflow's experiment 'digits' is deleted, but keeps its name; the run goes into 'digits-2'",
        "MLflow has no",
        "MLflow's experiment 'digits' is deleted, but keeps its name; the run goes into 'digits-2'",
        "MLflow has no",
        "MLflow has no",
    ]


@pytest.mark.parametrize("kind", ["damaged", "locked", "no file", "away"])
def test_a_run_continues_when_mlflow_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Also where it starts so; only a server must be there at a run's first start."""
    database, run_dir = tmp_path / "mlflow.db", tmp_path / "run"
    run_dir.mkdir()
    uri = None
    with closing(sqlite3.connect(database, isolation_level=None)) as connection, patch.object(mlflow_run, "BUSY_S", 0.1):
        if kind == "damaged":
            database.write_bytes(b"no database " * 1000)
        elif kind == "locked":
            connection.execute("BEGIN EXCLUSIVE")
        elif kind == "no file":
            database.unlink(missing_ok=True)
            database.mkdir()
        else:
            uri = f"http://127.0.0.1:{free_port()}"
        config = Config(run_dir=str(run_dir), tracking=TrackingConfig(uri=uri))
        with (  # noqa: PT012
            patch.dict(os.environ, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}),
            pytest.raises(ZeroDivisionError),
            tracker_of(config, run_dir, 1 if kind == "away" else None) as tracker,
        ):
            for step in (2, 3):
                tracker.log(step, {"loss": 1.0})
            raise ZeroDivisionError
    assert [line["step"] for line in metrics_of(run_dir)] == [2, 3]
    waits, lacks = [record.getMessage() for record in caplog.records if record.name == "svite_scale"]
    assert waits.startswith("MLflow doesn't take metrics (")
    assert lacks.startswith("MLflow lacks its last 2 metrics: ")
    assert not (run_dir / "mlflow_run_id").exists()


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        (TrackingConfig(experiment=""), "tracking.experiment = '': MLflow refuses it ("),
        (TrackingConfig(uri="nowhere://x"), "tracking.uri = 'nowhere://x': MLflow can't be used ("),
    ],
)
def test_the_first_start_fails_when_mlflow_refuses_the_options(tmp_path: Path, tracking: TrackingConfig, message: str) -> None:
    with pytest.raises(RunError) as caught:
        tracker_of(Config(run_dir="a", tracking=tracking), tmp_path / "run", None)
    assert str(caught.value).startswith(message)
