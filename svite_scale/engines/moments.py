"""Optimizer state of one entry per weight, and scalar state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from svite_scale.errors import TopologyError

REMEDY = "use an optimizer with one entry per weight, such as AdamW"


def elementwise(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """Returns the tensors of one parameter's optimizer state with an entry per weight, without scalars such as ``step``.

    Args:
        state: ``optimizer.state[parameter]``.
        shape: the parameter's own shape.

    Raises:
        TopologyError: the state has a tensor of another shape (a factored moment, say) or dtype (a quantised one), or a list of
            tensors, which can't follow a weight that moves.
    """
    for name, value in state.items():
        if isinstance(value, list | tuple | dict):
            raise TopologyError(f"optimizer state {name!r}, a {type(value).__name__}, can't follow moving weights; {REMEDY}")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    for name, value in tensors.items():
        if value.shape != shape:
            raise TopologyError(
                f"optimizer state {name!r} of shape {tuple(value.shape)} for a parameter of shape {tuple(shape)} can't follow "
                f"moving weights; {REMEDY}"
            )
        if not value.is_floating_point():
            raise TopologyError(f"optimizer state {name!r} of {value.dtype} can't follow moving weights; {REMEDY}")
    return tensors


def scalars(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the scalar state (``step`` and the like), which is the same for all parameters; empty before the first step."""
    for state in optimizer.state.values():
        return {name: float(value) for name, value in state.items() if not isinstance(value, Tensor) or value.dim() == 0}
    return {}


def write_scalars(optimizer: torch.optim.Optimizer, values: Mapping[str, float]) -> None:
    """Gives every parameter the scalar state that :func:`scalars` returned."""
    for state in optimizer.state.values():
        for name, value in values.items():
            if isinstance(state[name], Tensor):
                state[name].fill_(value)
            else:
                state[name] = type(state[name])(value)
