"""The sliced form: the physically smaller model, and the file that rebuilds it without this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from svite_scale.models import sliced_model
from svite_scale.models.dense import check_model
from svite_scale.models.options import ModelConfig
from svite_scale.models.token_selector import TokenSelector
from svite_scale.sparsity.dense import to_dense
from svite_scale.sparsity.layers.units import UnitLayer


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
    sliced.load_state_dict(sliced_model.slice_units(to_dense(model).state_dict(), active_units(model)))
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
