"""The sliced form: the physically smaller model, and the file that rebuilds it without this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from svite_scale.errors import ExportError
from svite_scale.export.form import Description, Export, Notes
from svite_scale.models import sliced_model
from svite_scale.models.dense import check_model
from svite_scale.models.options import ModelConfig
from svite_scale.models.sliced_model import AttentionSelector
from svite_scale.models.token_selector import TokenSelector
from svite_scale.sparsity.dense import to_dense
from svite_scale.sparsity.layers.units import UnitLayer


def write(export: Export, folder: Path) -> Notes:
    """Writes ``model.json``, ``model.safetensors``, and ``sliced_model.py``, which builds the model from them."""
    description = describe(export.model, export.description.model)
    sliced_model.save(slice_model(export.model, export.description.model), description, folder)
    shutil.copyfile(sliced_model.__file__, folder / "sliced_model.py")
    limits = ("Inactive weights within active heads and neurons are stored as zeros.",)
    return Notes(USAGE, limits=limits)


def read(folder: Path, description: Description) -> nn.Module:
    """Returns the sliced model. It is built by this package's own ``sliced_model.py``, not by the folder's.

    Raises:
        ExportError: a file is missing or damaged, or of another model than ``export.json`` says.
    """
    try:
        found = sliced_model.read_description(folder)
        if found["architecture"] != description.model.name:
            raise ValueError(f"it is of {found['architecture']!r}, and export.json of {description.model.name!r}")
        return sliced_model.load(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder} can't be used ({error}); export the model again") from error


def is_smaller(model: nn.Module) -> bool:
    """Returns whether the sliced model lacks anything that the dense one has: heads, neurons or tokens."""
    return any(isinstance(module, (UnitLayer, TokenSelector)) for module in model.modules())


def slice_model(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Returns the sliced model of equal output, on the CPU, in evaluation mode, without this package's layers.

    Inactive single weights stay, as zeros.

    Args:
        model: sparse, on the CPU.
        config: what the model was built from.

    Raises:
        TopologyError: see :func:`~svite_scale.sparsity.dense.to_dense`.
    """
    sliced = sliced_model.build(describe(model, config))
    state = sliced_model.slice_units(to_dense(model).state_dict(), active_units(model))
    # Not what token selectors have for training only.
    sliced.load_state_dict({name: tensor for name, tensor in state.items() if name in sliced.state_dict()})
    return sliced


def describe(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """Returns the content of ``model.json``: architecture and sizes."""
    options, _ = check_model(config)
    units = active_units(model)
    sizes = {
        kind: {name: {"active": int(active.count_nonzero()), "of": active.numel()} for name, active in units[kind].items()}
        for kind in sliced_model.UNIT_DIMENSIONS
    }
    selectors = {
        name.rpartition(".selector")[2]: {
            "num_tokens": module.num_tokens,
            "num_prefix": module.num_prefix,
            "mode": module.mode,
            **({"num_queries": len(module.attention.queries)} if isinstance(module, AttentionSelector) else {}),
        }
        for name, module in model.named_modules()
        if isinstance(module, TokenSelector)
    }
    return {
        "format": sliced_model.FORMAT,
        "architecture": config.name,
        "options": {name: value for name, value in options.items() if name in sliced_model.OPTIONS},
        **sizes,
        "selectors": selectors,
    }


def active_units(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Returns the active heads and neurons of a sparse model, by kind and module name: bool ``[units]``."""
    units: dict[str, dict[str, Tensor]] = {kind: {} for kind in sliced_model.UNIT_DIMENSIONS}
    for name, module in model.named_modules():
        if isinstance(module, UnitLayer):
            units[module.unit][name] = module.active_units()
    return units


USAGE = """\
With torch, timm and safetensors, in this folder or with it on the path:

```python
from sliced_model import load

model = load(".")
logits = model(images)  # normalised float32 [B, C, H, W]
```
"""
