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
from safetensors.torch import load_file, save_file

from svite_scale.config.load import read_config, to_yaml
from svite_scale.config.plain_yaml import dump
from svite_scale.errors import RunError
from svite_scale.export.read import read_export
from svite_scale.publish import form_for, prefers_average, publish, without_front_matter
from svite_scale.saved_run import load_model, read_run
from svite_scale.tracking.options import TrackingConfig
from tests.command_line import Answer, run_here
from tests.tracking.trackers import tracker_of


@pytest.fixture(scope="module")
def run_dir(saved: Callable[[str], Path], empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run whose heads, neurons and tokens are sparse, in MLflow by default. It is published twice, because the first
    export is spoiled."""
    run_dir = Path(shutil.copytree(saved("tokens"), tmp_path_factory.mktemp("published") / "tokens"))
    shutil.copy(empty_database, run_dir.parent)
    config = replace(read_config(run_dir / "config.yaml"), tracking=TrackingConfig())
    (run_dir / "config.yaml").write_text(to_yaml(config))
    address = mlflow.get_tracking_uri()
    with tracker_of(config, run_dir, 20):
        pass
    publish(run_dir, config.tracking)
    (export,) = (run_dir / "export").iterdir()
    (export / "former").touch()
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(export / "model.safetensors").items()}
    save_file(weights, export / "model.safetensors")
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


def test_publish_replaces_its_former_export(run_dir: Path) -> None:
    (export,) = (run_dir / "export").iterdir()
    assert not (export / "former").exists()
    assert any(tensor.count_nonzero() for tensor in load_file(export / "model.safetensors").values())


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


Command = Callable[..., tuple[Answer, list[tuple[Path, TrackingConfig]]]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Returns a function that runs the command with a training of no steps, and returns what was published."""

    def train(
        *overrides: str, training: Callable[[Path], int] = lambda _: 0, failure: BaseException | None = None, **names: str
    ) -> tuple[Answer, list[tuple[Path, TrackingConfig]]]:
        config, published = tmp_path / "config.yaml", []
        config.write_text(f"run_dir: {tmp_path}/run\n")

        def published_now(run_dir: Path, tracking: TrackingConfig) -> None:
            published.append((run_dir, tracking))
            if failure is not None:
                raise failure

        monkeypatch.setattr("svite_scale.train.run.train", lambda *_, **__: training(config))
        monkeypatch.setattr("svite_scale.publish.publish", published_now)
        return run_here(capsys, "--config", str(config), *overrides, launcher=names), published

    return train


@pytest.mark.parametrize("edit", [Path.unlink, lambda path: path.write_text("run_dir: elsewhere\n")])
def test_command_publishes_the_run_that_it_trained(train: Command, tmp_path: Path, edit: Callable[[Path], object]) -> None:
    answer, published = train("tracking.experiment=mine", training=lambda path: bool(edit(path)) and 0)
    assert (answer.status, answer.err) == (0, "")
    assert published == [(tmp_path / "run", TrackingConfig(experiment="mine"))]


def test_command_publishes_only_finished_runs_on_the_main_rank(train: Command) -> None:
    assert train(training=lambda _: 85)[1] == []
    assert train("tracking.publish=false")[1] == []
    assert train("tracking.mlflow=false")[1] == []
    assert train(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")[1] == []


@pytest.mark.parametrize("failure", [RunError("no disk\nmore"), ImportError("no disk"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_to_publish_is_one_warning(
    train: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: BaseException
) -> None:
    answer, _ = train(failure=failure)
    assert answer.status == 0
    (message,) = [record.getMessage() for record in caplog.records if record.name == "svite_scale"]
    assert message.startswith(f"{tmp_path / 'run'} isn't published ({type(failure).__name__}: ")
    assert message.endswith("; train it again with --resume to repeat only this")
    assert "\n" not in message


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
    for license in ("mine ---", "a\n---\nb", "---"):
        assert without_front_matter(f"---\n{dump({'license': license, 'tags': ['a']})}---\n\n# Title") == "# Title"
