"""Runs in MLflow's database, which is shared, damaged, deleted or away: training continues, a resumed run is the same run."""

from __future__ import annotations

import multiprocessing
import re
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from svite_scale.config.load import flatten_config, read_config, to_dict
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.errors import RunError
from svite_scale.tracking import mlflow_queue, sqlite_file
from svite_scale.tracking.options import TrackingConfig
from svite_scale.tracking.tags import git_revision
from tests.ranks import free_port
from tests.runs import metrics_of
from tests.tracking.trackers import tracker_of
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    # A slow machine is no failure.
    monkeypatch.setattr(mlflow_queue, "END_S", 120.0)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "svite_scale"]


def run_id_of(run_dir: Path) -> str:
    return (run_dir / "mlflow_run_id").read_text().strip()


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


def test_a_run_is_described_and_stays_one_run_when_it_is_resumed(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    uri, run_dir = f"sqlite:///{database}", database.parent / "runs" / "a"
    tracking = TrackingConfig(uri=uri, experiment="digits")
    config = Config(run_dir=str(run_dir), tracking=tracking, sparsity=SparsityConfig(densities={"blocks.*": 0.3}))
    with pytest.raises(ZeroDivisionError), tracker_of(config, run_dir, None) as tracker:  # noqa: PT012
        tracker.log(1, {"loss": 2.0, "epoch": 0.5})
        assert tracker.ui_command == f"mlflow ui --backend-store-uri {uri}"
        raise ZeroDivisionError
    client, run_id = MlflowClient(uri), run_id_of(run_dir)
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("a", "FAILED")
    assert run.data.params == {name: str(value) for name, value in flatten_config(to_dict(config)).items()}
    assert run.data.params["sparsity.densities"] == "{'blocks.*': 0.3}", "one parameter: its names allow no asterisk"
    tags = run.data.tags
    assert {name: tags[name] for name in ("engine", "world_size", "slurm_job_id")} == {
        "engine": "ddp",
        "world_size": "2",
        "slurm_job_id": "71",
    }
    assert (tags["host"], tags.get("git_revision")) == (subprocess.getoutput("hostname"), git_revision())
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] < 100
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert read_config(client.download_artifacts(run_id, "config.yaml")) == config
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(database.parent / "mlartifacts")

    resumed = Config(run_dir=str(run_dir), tracking=tracking, seed=config.seed + 1)
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    with tracker_of(resumed, run_dir, 1) as tracker:
        wait_until(lambda: client.get_run(run_id).info.status == "RUNNING")
        tracker.log(2, {"loss": 1.0, "epoch": 1.0})
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_id, run.info.status, run.data.tags["slurm_job_id"]) == (run_id, "FINISHED", "72")
    assert run.data.params["seed"] == str(config.seed), "MLflow keeps the first value"
    assert read_config(client.download_artifacts(run_id, "config.yaml")) == resumed
    history = {
        name: [(entry.step, entry.value) for entry in client.get_metric_history(run_id, name)] for name in ("loss", "epoch")
    }
    assert history == {"loss": [(1, 2.0), (2, 1.0)], "epoch": [(1, 0.5), (2, 1.0)]}


def test_git_revision_says_whether_files_have_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ("git", *identity, *words), cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    with patch("svite_scale.tracking.tags.__file__", str(tmp_path / "tags.py")):
        assert git_revision() is None
        git("init")
        (tmp_path / "tags.py").write_text("a")
        git("add", ".")
        git("commit", "--message", "a")
        git("tag", "v1", "--annotate", "--message", "a")
        revision = git("rev-parse", "HEAD")
        assert re.fullmatch("[0-9a-f]{40}", revision)
        assert git_revision() == revision
        (tmp_path / "tags.py").write_text("b")
        assert git_revision() == f"{revision}-dirty"


@pytest.mark.parametrize("given", [True, False])
def test_the_config_wins_over_the_environment(database: Path, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{database}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database.parent}/nowhere/else.db" if given else uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    tracking = TrackingConfig(uri=uri, experiment="of the config") if given else TrackingConfig()
    run_dir = database.parent / "runs" / "a"
    with tracker_of(Config(run_dir=str(run_dir), tracking=tracking), run_dir, None):
        pass
    client = MlflowClient(uri)
    experiment = client.get_experiment(client.get_run(run_id_of(run_dir)).info.experiment_id).name
    assert experiment == ("of the config" if given else "of the environment")


def test_mlflow_gets_a_new_run_when_the_old_one_is_deleted(database: Path, warnings: Callable[[], list[str]]) -> None:
    """A run, an experiment, the file, and the name of the run, one after another, while training continues."""
    from mlflow import MlflowClient

    run_dir = database.parent / "run"
    client = MlflowClient(f"sqlite:///{database}")
    config = Config(run_dir=str(run_dir), tracking=TrackingConfig(experiment="digits"))

    def steps() -> list[int]:
        return [entry.step for entry in client.get_metric_history(run_id_of(run_dir), "loss")]

    with tracker_of(config, run_dir, None) as tracker:
        tracker.log(1, {"loss": 1.0})
        wait_until(lambda: steps() == [1])
        client.delete_run(run_id_of(run_dir))
        tracker.log(2, {"loss": 2.0})
        wait_until(lambda: steps() == [2])
        client.delete_experiment(client.get_run(run_id_of(run_dir)).info.experiment_id)
        tracker.log(3, {"loss": 3.0})
        wait_until(lambda: steps() == [3])
        run = client.get_run(run_id_of(run_dir))
        assert client.get_experiment(run.info.experiment_id).name == "digits-2"
        assert (run.data.params["seed"], run.data.tags["engine"]) == (str(config.seed), "ddp")
    (run_dir / "mlflow_run_id").write_bytes(b"\xff../../elsewhere")
    with tracker_of(config, run_dir, 3) as tracker:
        wait_until(lambda: re.fullmatch("[0-9a-f]{32}", (run_dir / "mlflow_run_id").read_text(errors="replace").strip()))
        database.unlink()
        tracker.log(4, {"loss": 4.0})
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT run_uuid, step FROM metrics WHERE key = 'loss'").fetchall()
    assert found == [(run_id_of(run_dir), 4)]
    assert [line.partition(" any more; it continues as a new one, ")[0].partition(" run '")[0] for line in warnings()] == [
        "MLflow has no",
        "MLflow's experiment 'digits' is deleted, but keeps its name; the run goes into 'digits-2'",
        "MLflow has no",
        "MLflow's experiment 'digits' is deleted, but keeps its name; the run goes into 'digits-2'",
        "MLflow has no",
        "MLflow has no",
    ]


@pytest.mark.parametrize("kind", ["damaged", "locked", "no file", "away"])
def test_a_run_continues_when_mlflow_fails(tmp_path: Path, warnings: Callable[[], list[str]], kind: str) -> None:
    """Also where it starts so; only a server must be there at a run's first start."""
    database, run_dir = tmp_path / "mlflow.db", tmp_path / "run"
    run_dir.mkdir()
    uri = None
    with closing(sqlite3.connect(database, isolation_level=None)) as connection, patch.object(sqlite_file, "BUSY_S", 0.1):
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
        with pytest.raises(ZeroDivisionError), tracker_of(config, run_dir, 1 if kind == "away" else None) as tracker:  # noqa: PT012
            for step in (2, 3):
                tracker.log(step, {"loss": 1.0})
            wait_until(warnings)
            raise ZeroDivisionError
    assert [line["step"] for line in metrics_of(run_dir)] == [2, 3]
    waits, lacks = warnings()
    assert waits.startswith("MLflow doesn't take metrics (")
    assert re.match(r"MLflow lacks \d+ metrics: ", lacks)
    assert not (run_dir / "mlflow_run_id").exists()


@pytest.mark.parametrize(
    ("tracking", "environment", "message"),
    [
        (TrackingConfig(experiment=""), {}, "tracking.experiment = '': MLflow refuses it ("),
        (TrackingConfig(uri="nowhere://x"), {}, "tracking.uri = 'nowhere://x': MLflow can't be used ("),
        (
            TrackingConfig(),
            {"MLFLOW_TRACKING_URI": "nowhere://x"},
            "MLFLOW_TRACKING_URI = 'nowhere://x': MLflow can't be used (",
        ),
    ],
)
def test_the_first_start_fails_when_mlflow_refuses_the_options(
    database: Path, monkeypatch: pytest.MonkeyPatch, tracking: TrackingConfig, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError) as caught:
        tracker_of(Config(run_dir="a", tracking=tracking), database.parent / "run", None)
    assert str(caught.value).startswith(message)


def test_the_first_start_names_a_server_that_is_away(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunError, match=rf"^tracking\.uri = '{uri}': MLflow can't be used \(.*\); start the server or correct"):
        tracker_of(Config(run_dir="a", tracking=TrackingConfig(uri=uri)), tmp_path / "run", None)
