"""A run that logs to a real MLflow server, which hangs, stops and starts again under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.tracking import mlflow_queue
from svite_scale.tracking.options import TrackingConfig
from tests.ranks import free_port
from tests.tracking.trackers import tracker_of
from tests.waiting import wait_until


class MlflowServer:
    """``mlflow server`` on loopback, with a SQLite store.

    Attributes:
        uri: its address.
    """

    def __init__(self, database: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        place = ("--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(database.parent / "artifacts"))
        listen = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1")
        self._command = (sys.executable, "-m", "mlflow", "server", *place, *listen)

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(self._command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_until(self._answers)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all processes of the server."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, "it has ended"
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, TimeoutError, ConnectionError):
            return False


@pytest.fixture
def server(database: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(database)
    server.start()
    yield server
    server.stop()


def test_a_server_that_hangs_and_restarts_gets_every_step_once(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(mlflow_queue, "RETRY_S", 0.2)
    monkeypatch.setattr(mlflow_queue, "END_S", 120.0)
    client, run_dir = MlflowClient(server.uri), tmp_path / "run"
    config = Config(run_dir=str(run_dir), tracking=TrackingConfig(experiment="digits"))

    def steps() -> list[int]:
        return [entry.step for entry in client.get_metric_history((run_dir / "mlflow_run_id").read_text().strip(), "loss")]

    with tracker_of(config, run_dir, None) as tracker:
        assert tracker.ui_command == f"a browser at {server.uri}"
        tracker.log(1, {"loss": 1.0})
        wait_until(lambda: steps() == [1])
        server.signal(signal.SIGSTOP)
        for step in range(2, 50):
            tracker.log(step, {"loss": 1.0})
        wait_until(lambda: "MLflow doesn't take metrics" in caplog.text)
        server.signal(signal.SIGCONT)
        wait_until(lambda: steps() == list(range(1, 50)))
        server.stop()
        caplog.clear()
        tracker.log(50, {"loss": 1.0})
        wait_until(lambda: "MLflow doesn't take metrics" in caplog.text)
        server.start()
        tracker.log(51, {"loss": 1.0})
    assert steps() == list(range(1, 52))
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.status, run.data.params["seed"], run.data.tags["engine"]) == ("FINISHED", str(config.seed), "ddp")
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert read_config(client.download_artifacts(run.info.run_id, "config.yaml")) == config
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
