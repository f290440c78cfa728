"""The form ``timm``: ordinary dense weights, and a ``config.json`` from which timm builds the model."""

from __future__ import annotations

from pathlib import Path

from timm.models import save_for_hf
from torch import nn

from svite_scale.errors import ExportError
from svite_scale.export.form import WEIGHTS, Description, Export, Notes, empty_model, load_tensors, read_tensors
from svite_scale.models.token_selector import token_selectors
from svite_scale.sparsity.dense import to_dense

OF_OTHER_WEIGHTS = ("tag", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""Entries of timm's own configuration of the model that are about weights other than the run's."""


def write(export: Export, folder: Path) -> Notes:
    """Writes ``config.json`` and ``model.safetensors``. Inactive weights, heads and neurons are zeros.

    Raises:
        ExportError: the model has token selectors, which timm doesn't know.
    """
    if token_selectors(export.model):
        raise ExportError(
            "--format timm: the model has token selectors, which timm's models don't have; use sliced, packed, onnx or pt2"
        )
    description, preprocessing = export.description, export.description.preprocessing
    size = preprocessing.image_size
    save_for_hf(
        to_dense(export.model),
        str(folder),
        model_config={"pretrained_cfg": {**dict.fromkeys(OF_OTHER_WEIGHTS), "license": description.license}},
        safe_serialization=True,
        data_config={
            "input_size": (description.model.in_channels, size, size),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.eval_crop,
        },
    )
    limit = "Inactive weights are stored as zeros, so the file is as large as the dense model's, and it computes as much."
    return Notes(usage=USAGE, limits=(limit,), library="timm")


def read(folder: Path, description: Description) -> nn.Module:
    """Returns timm's model with the weights of the folder; it is built from ``export.json``, not from ``config.json``."""
    model = empty_model(description)
    load_tensors(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model


USAGE = """\
With [timm](https://github.com/huggingface/pytorch-image-models), from this folder:

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # image: of PIL
```
"""
