"""The form ``pt2``: a program of ``torch.export``, which torch runs without the Python code of the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from svite_scale.errors import ExportError
from svite_scale.export.form import Description, Export, Notes
from svite_scale.export.sliced_form import slice_model

PROGRAM = "model.pt2"


def write(export: Export, folder: Path) -> Notes:
    """Writes ``model.pt2``: the sliced model, for any number of images at a time.

    Raises:
        ExportError: torch can't trace the model.
    """
    model, batch = slice_model(export.model, export.description.model), torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(model, (export.example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"--format pt2: torch.export can't trace {type(model).__name__} ({reason}); use timm or packed"
        ) from error
    try:
        torch.export.save(program, folder / PROGRAM)
    except RuntimeError as error:  # torch's, also for a full disk
        raise ExportError(f"can't write {PROGRAM} ({error}); give --out a folder with room") from error
    limits = (
        "Loading a `.pt2` file can run code that is in it. Load it only if you trust whoever made it.",
        "The program computes in fp32 on the device it was exported on, the CPU; `torch.export.passes` moves it to another.",
    )
    return Notes(usage=USAGE, limits=limits)


def read(folder: Path, description: Description) -> nn.Module:
    """Returns the program as a module. This trusts the file, which torch unpickles."""
    path = folder / PROGRAM
    try:
        return Program(torch.export.load(path).module())
    except Exception as error:  # the readers of damaged files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{path} can't be read ({reason}); export the model again") from error


class Program(nn.Module):
    """An exported program as a module that is always in evaluation mode."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program, self.training = program, False

    def forward(self, images: Tensor) -> Tensor:
        """fp32 ``[B, C, H, W]`` to logits ``[B, classes]``."""
        logits: Tensor = self.program(images)
        return logits

    def train(self, mode: bool = True) -> Program:
        """Changes nothing: the program was traced in evaluation mode."""
        return self


USAGE = """\
With torch alone:

```python
import torch

model = torch.export.load("FOLDER/model.pt2").module()
logits = model(images)  # float32 [B, C, H, W], normalised as export.json says
```
"""
