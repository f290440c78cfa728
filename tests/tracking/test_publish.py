"""Publishing a finished run: its report, an export, and a model that MLflow loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import mlflow.pytorch
import pytest
import torch
from mlflow import MlflowClient

from svite_scale.config.load import read_config, to_yaml
from svite_scale.export.read import read_export
from svite_scale.publish import form_for, prefers_average, publish, without_front_matter
from svite_scale.saved_run import load_model, read_run
from svite_scale.tracking.options import TrackingConfig
from tests.tracking.trackers import tracker_of


@pytest.fixture(scope="module")
def run_dir(saved: Callable[[str], Path], empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run whose heads, neurons and tokens are sparse, in MLflow by default, and published twice."""
    run_dir = Path(shutil.copytree(saved("tokens"), tmp_path_factory.mktemp("published") / "tokens"))
    shutil.copy(empty_database, run_dir.parent)
    config = replace(read_config(run_dir / "config.yaml"), tracking=TrackingConfig())
    (run_dir / "config.yaml").write_text(to_yaml(config))
    address = mlflow.get_tracking_uri()
    with tracker_of(config, run_dir, 20):
        pass
    publish(run_dir, config.tracking)
    publish(run_dir, config.tracking)
    yield run_dir
    mlflow.set_tracking_uri(address)


@pytest.fixture(scope="module")
def run_id(run_dir: Path) -> str:
    return (run_dir / "mlflow_run_id").read_text().strip()


def test_publish_logs_report_export_and_card(run_dir: Path, run_id: str) -> None:
    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    (export,) = (run_dir / "export").iterdir()
    logged = {file.path for folder in ("", "report", "export") for file in client.list_artifacts(run_id, folder)}
    assert logged >= {"config.yaml", "report/report.html", "report/pictures"}
    assert logged >= {f"export/{path.name}" for path in export.iterdir()}
    assert read_export(Path(client.download_artifacts(run_id, "export"))).form == "sliced"
    description = run.data.tags["mlflow.note.content"]
    assert description.startswith("# tokens")
    assert (export / "README.md").read_text().endswith(description)


def test_mlflow_loads_the_published_model(run_dir: Path, run_id: str) -> None:
    run = read_run(run_dir)
    sparse = load_model(run)
    loaded = mlflow.pytorch.load_model(f"runs:/{run_id}/model")
    served = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 1, 8, 8)
        with torch.inference_mode():
            expected = sparse(images)
            torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(served.predict(images.numpy())), expected, rtol=0, atol=1e-5)
    assert served.metadata.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    assert served.metadata.signature.outputs.inputs[0].shape == (-1, 10)
    assert served.metadata.metadata["preprocessing"]["mean"] == list(run.config.data.mean)


def test_a_failure_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path / "nothing", TrackingConfig())
    (message,) = [record.getMessage() for record in caplog.records if record.name == "svite_scale"]
    assert message.startswith(f"{tmp_path / 'nothing'} isn't published (RunError: ")
    assert message.endswith("; train it again with --resume to repeat only this")


def test_the_form_fits_what_is_absent(saved: Callable[[str], Path]) -> None:
    config = read_run(saved("weights")).config
    assert form_for(config) == "timm"
    assert form_for(read_run(saved("single")).config) == "sliced"
    tokens = replace(config.sparsity, tokens=replace(config.sparsity.tokens, keep=0.5))
    assert form_for(replace(config, sparsity=tokens)) == "sliced"


def test_the_average_is_preferred_when_it_did_better(saved: Callable[[str], Path]) -> None:
    run = read_run(saved("weights"))
    assert "eval_ema_accuracy" in run.metrics[-1]

    def after(*accuracies: tuple[float, float]) -> bool:
        lines = [{"step": 1, "eval_accuracy": weights, "eval_ema_accuracy": ema} for weights, ema in accuracies]
        return prefers_average(replace(run, metrics=[*lines, {"step": 2, "loss": 1.0}]))

    assert after((0.5, 0.4), (0.5, 0.6))
    assert not after((0.5, 0.6), (0.5, 0.5))
    assert not prefers_average(replace(run, metrics=[{"step": 1, "eval_accuracy": 0.5}]))


def test_without_front_matter_leaves_the_text() -> None:
    assert without_front_matter("---\na: 1\n---\n\n# Title\n\n---\ntext") == "# Title\n\n---\ntext"
    assert without_front_matter("# Title") == "# Title"
