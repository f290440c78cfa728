"""The result of a finished run in MLflow: files, a description for its page, and a model that loads and serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svite_scale.errors import RunError
from svite_scale.tracking.mlflow_run import RUN_ID_FILE, Store
from svite_scale.tracking.options import TrackingConfig

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION_TAG = "mlflow.note.content"
"""The tag that MLflow's page shows as the description of a run."""

MODEL = "model"
"""Name of the model in MLflow's run."""


@dataclass(frozen=True)
class Result:
    """What a finished run gives.

    Attributes:
        folders: logged as artifacts, by their names there.
        description: Markdown for the run's page.
        model: on the CPU, in evaluation mode: fp32 ``[B, C, H, W]``, normalised, to logits ``[B, classes]``.
        image_shape: ``(C, H, W)``.
        metadata: logged with the model.
    """

    folders: Mapping[str, Path]
    description: str
    model: nn.Module
    image_shape: tuple[int, int, int]
    metadata: Mapping[str, object]


def log_result(options: TrackingConfig, run_dir: Path, result: Result) -> None:
    """Logs a result to the run's entry in MLflow. One that is there already is replaced; the model gets a new version.

    The model is logged as a ``torch.export`` program, so MLflow loads it without this package and unpickles no code.

    Raises:
        RunError: the run isn't in MLflow.
        Exception: whatever MLflow, its database and the network raise.
    """
    import mlflow
    import mlflow.pytorch
    import torch
    from mlflow import MlflowClient
    from mlflow.models import infer_signature

    store = Store(options, run_dir)
    try:
        run_id = (run_dir / RUN_ID_FILE).read_text().strip()
    except OSError as error:
        raise RunError(f"{run_dir} isn't in MLflow; train it with tracking.mlflow=true") from error
    client = MlflowClient(store.uri)
    for name, folder in result.folders.items():
        client.log_artifacts(run_id, str(folder), name)
    client.set_tag(run_id, DESCRIPTION_TAG, result.description)

    # Two images, because torch.export takes a single one for a constant; in steps of 1/8, whose text is short.
    shape, generator = (2, *result.image_shape), torch.Generator().manual_seed(0)
    images = torch.randint(-16, 17, shape, generator=generator) / 8
    with torch.inference_mode():
        logits = result.model(images)
    mlflow.set_tracking_uri(store.uri)
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        mlflow.pytorch.log_model(
            result.model,
            name=MODEL,
            signature=infer_signature(images.numpy(), logits.numpy()),
            input_example=images.numpy(),
            pip_requirements=mlflow.pytorch.get_default_pip_requirements(),
            metadata=dict(result.metadata),
            serialization_format="pt2",
        )
