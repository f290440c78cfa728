"""The table of forms, and reading an exported folder of any form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from svite_scale.errors import ConfigError, ExportError
from svite_scale.export import onnx_form, packed_form, program_form, sliced_form, timm_form
from svite_scale.export.form import DESCRIPTION, Description, Form, Preprocessing, read_description

FORMS: Mapping[str, Form] = {
    "timm": timm_form,
    "sliced": sliced_form,
    "packed": packed_form,
    "onnx": onnx_form,
    "pt2": program_form,
}
"""By name, the module that writes and reads a form."""

CAN_RUN_CODE = frozenset({"pt2"})
"""Forms whose files torch unpickles."""


@dataclass(frozen=True)
class Exported:
    """A model that was read from an exported folder.

    Attributes:
        model: on the CPU, in evaluation mode: fp32 ``[B, C, H, W]``, normalised, to logits ``[B, classes]``.
        description: the content of ``export.json``.
    """

    model: nn.Module
    description: Description

    @property
    def form(self) -> str:
        """The name of the form."""
        return self.description.form

    @property
    def preprocessing(self) -> Preprocessing:
        """What to do to an image before the model gets it."""
        return self.description.preprocessing

    @property
    def num_classes(self) -> int:
        """The number of logits."""
        return self.description.model.num_classes

    @property
    def name(self) -> str:
        """timm's name of the dense model."""
        return self.description.model.name


def read_export(path: Path, *, trusted: bool = False) -> Exported:
    """Reads an exported model.

    Args:
        path: of the folder, or of a file in it.
        trusted: you trust whoever made the folder. The form ``pt2`` needs this, because its files can run code.

    Raises:
        ExportError: the folder holds no export, one of its files is missing or damaged, or its form needs trust.
    """
    folder = path if path.is_dir() else path.parent
    description = read_description(folder)
    if description.form not in FORMS:
        raise ExportError(f"{folder} is of the form {description.form!r}, which is unknown; known are {', '.join(FORMS)}")
    if description.form in CAN_RUN_CODE and not trusted:
        raise ExportError(
            f"{folder} is of the form {description.form}, and loading such a file can run code that is in it; if you trust "
            "whoever made it, load it with trust (read_export(path, trusted=True), launch/evaluate.py --trust), or use another "
            "form of the model"
        )
    try:
        model = FORMS[description.form].read(folder, description)
        _check_shapes(model, description, folder / DESCRIPTION)
        return Exported(model, description)
    except ConfigError as error:
        raise ExportError(f"{folder} can't be used ({error}); export the model again") from error


def _check_shapes(model: nn.Module, description: Description, path: Path) -> None:
    """Checks by one forward that a model takes the images and gives the logits that its description says.

    Raises:
        ExportError: it doesn't; names ``path``, the file of the description.
    """
    config = description.model
    images = [2, config.in_channels, config.image_size, config.image_size]
    try:
        with torch.no_grad():
            shape = list(model(torch.zeros(images)).shape)
        problem = f"its logits have the shape {shape}"
    except Exception as error:  # whatever a model raises
        shape, problem = [], (str(error).strip() or type(error).__name__).splitlines()[0]
    if shape != [2, config.num_classes]:
        says = f"it says images {images} and {config.num_classes} classes"
        raise ExportError(f"{path} isn't of the model beside it: {says}, but {problem}; export the model again")
