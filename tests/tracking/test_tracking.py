"""Metrics files and MLflow: nothing is lost to a failure, and a resumed run is the same run."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from svite_scale.config.load import flatten_config, read_config
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.data.randomness import seed_step
from svite_scale.errors import RunError
from svite_scale.tracking.mlflow_run import RETRY_S
from svite_scale.tracking.options import TrackingConfig
from tests.ranks import free_port
from tests.runs import metrics_of
from tests.tracking.trackers import tracker_of


def quiet(run_dir: Path) -> Config:
    return Config(run_dir=str(run_dir), tracking=TrackingConfig(mlflow=False))


def test_log_writes_lines_at_once_on_the_main_rank_only(tmp_path: Path) -> None:
    run_dir = tmp_path / "folder" / "run"
    with tracker_of(quiet(run_dir), run_dir, None, enabled=False) as tracker:
        tracker.log(1, {"loss": 2.0})
        tracker.summarize({"steps": 1})
        assert tracker.ui_command is None
    assert not run_dir.parent.exists()
    with tracker_of(quiet(run_dir), run_dir, None) as tracker:
        tracker.log(1, {"loss": 2.0})
        assert metrics_of(run_dir) == [{"step": 1, "loss": 2.0}]
        tracker.log(3, {"loss": 1.5, "density": 0.3})
        tracker.summarize({"steps": 3})
    assert metrics_of(run_dir)[1] == {"step": 3, "loss": 1.5, "density": 0.3}
    assert json.loads((run_dir / "summary.json").read_text()) == {"steps": 3}
    assert read_config(run_dir / "config.yaml") == quiet(run_dir)


@pytest.mark.parametrize("rest", ["", '{"step": 5, "lo', '{"step": 5'])
def test_a_resumed_run_removes_the_lines_after_its_checkpoint(tmp_path: Path, rest: str) -> None:
    whole = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 5))
    (tmp_path / "metrics.jsonl").write_text(whole + rest)
    with tracker_of(quiet(tmp_path), tmp_path, 3) as tracker:
        tracker.log(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in metrics_of(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_mlflow_has_one_run_when_a_failed_one_is_resumed(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    run_dir = tmp_path / "runs" / "a"
    config = Config(run_dir=str(run_dir), tracking=TrackingConfig(uri=uri, experiment="digits"))
    with pytest.raises(ZeroDivisionError), tracker_of(config, run_dir, None) as tracker:  # noqa: PT012
        tracker.log(1, {"loss": 2.0})
        assert tracker.ui_command == f"mlflow ui --backend-store-uri {uri}"
        raise ZeroDivisionError
    client = MlflowClient(uri)
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    assert client.get_run(run_id).info.status == "FAILED"
    with tracker_of(config, run_dir, 1) as tracker:
        assert client.get_run(run_id).info.status == "RUNNING"
        tracker.log(2, {"loss": 1.0})
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "a", "FINISHED")
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    with tracker_of(config, tmp_path / "runs" / "b", None):
        pass
    assert len(client.search_runs([run.info.experiment_id])) == 2


def test_metrics_wait_until_mlflow_takes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri, run_dir = f"sqlite:///{tmp_path / 'elsewhere.db'}", tmp_path / "runs" / "a"

    def ours() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "svite_scale"]

    refuses = patch.object(MlflowClient, "log_batch", side_effect=MlflowException("the server is away\nmore"))
    with tracker_of(Config(run_dir="a", tracking=TrackingConfig(uri=uri)), run_dir, None) as tracker:
        tracker.log(1, {"loss": 3.0})
        with refuses as asked:
            tracker.log(2, {"loss": 2.0})
            tracker.log(3, {"loss": 1.0})
            assert asked.call_count == 1, "not again at once"
        assert ours() == ["MLflow doesn't take metrics (the server is away); they wait until it does, and the run continues"]
        with patch.object(time, "monotonic", return_value=time.monotonic() + RETRY_S):
            tracker.log(4, {"loss": 0.0})
    client, run_id = MlflowClient(uri), (run_dir / "mlflow_run_id").read_text().strip()
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run_id, "loss")] == [
        (1, 3),
        (2, 2),
        (3, 1),
        (4, 0),
    ]
    caplog.clear()
    with tracker_of(Config(run_dir="a", tracking=TrackingConfig(uri=uri)), run_dir, 4) as tracker, refuses:
        tracker.log(5, {"loss": 0.0, "density": 0.3})
        tracker.__exit__(None, None, None)
    assert ours()[1] == "MLflow lacks its last 2 metrics: the server is away"


def test_the_first_start_names_a_server_that_is_away(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with (
        patch.dict(os.environ, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}),
        pytest.raises(RunError, match=rf"^tracking\.uri = '{uri}': MLflow can't be used \(.*\); start the server or correct"),
    ):
        tracker_of(Config(run_dir="a", tracking=TrackingConfig(uri=uri)), tmp_path / "run", None)


def test_the_tracker_names_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=rf"^run_dir = '{tmp_path}/file/run' can't be written \(.*Not a directory"):
        tracker_of(quiet(tmp_path / "file" / "run"), tmp_path / "file" / "run", None)


def test_flatten_config_joins_names_by_dots_and_keeps_mappings_of_patterns() -> None:
    nested = {"a": 1, "b": {"c": [2, 3], "d": {"e": None}}, "sparsity": {"densities": {"blocks.*": 0.3}}}
    flat = {"a": 1, "b.c": [2, 3], "b.d.e": None, "sparsity.densities": {"blocks.*": 0.3}}
    assert flatten_config(nested) == flat


def test_mlflow_logs_patterns_of_layers_as_one_parameter(tmp_path: Path) -> None:
    """Its names of parameters allow no asterisk."""
    from mlflow import MlflowClient

    uri, run_dir = f"sqlite:///{tmp_path / 'elsewhere.db'}", tmp_path / "runs" / "a"
    sparsity = SparsityConfig(densities={"blocks.*": 0.3, "*": 0.5})
    with tracker_of(Config(run_dir="a", sparsity=sparsity, tracking=TrackingConfig(uri=uri)), run_dir, None):
        pass
    logged = MlflowClient(uri).get_run((run_dir / "mlflow_run_id").read_text().strip()).data.params
    assert logged["sparsity.densities"] == str({"blocks.*": 0.3, "*": 0.5})


def test_what_a_step_draws_depends_on_where_it_is_alone() -> None:
    def draw(*entropy: int) -> tuple[float, float, float]:
        import random

        import numpy as np

        seed_step(*entropy)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 10, 0, 1), (0, 1, 0, 10)]
    drawn = [draw(*place) for place in places]
    assert drawn == [draw(*place) for place in places]
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == len(places)
    assert not any(math.isclose(a, b) for a, b, _ in drawn)
