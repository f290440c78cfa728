"""Which heads and neurons were active when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from svite_scale.report.saved_run import Line, damaged_line
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.units import UnitLayer


@dataclass(frozen=True)
class UnitHistory:
    """One layer's units over the updates.

    Attributes:
        layer: its name.
        unit: ``heads`` or ``neurons``.
        active: bool ``[N, updates]``, the start being the first column.
    """

    layer: str
    unit: str
    active: npt.NDArray[np.bool_]


def unit_histories(model: nn.Module, lines: Sequence[Line], path: Path) -> list[UnitHistory]:
    """By layer of heads or neurons, in the model's order; none without lines.

    Args:
        model: not wrapped by any engine.
        lines: of ``topology.jsonl``.
        path: of that file, for errors.

    Raises:
        RunError: a line has no mask of a layer, or one that isn't of its size.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, UnitLayer)}
    if not lines:
        return []
    return [
        UnitHistory(name, layer.unit, np.stack([_active(line, name, layer.shape.numel(), path) for line in lines], axis=1))
        for name, layer in layers.items()
    ]


def _active(line: Line, layer: str, num_units: int, path: Path) -> npt.NDArray[np.bool_]:
    """Bool ``[num_units]``."""
    try:
        masks: Mapping[str, str] = line["masks"]
        mask = torch.frombuffer(bytearray.fromhex(masks[layer]), dtype=torch.uint8)
        return bits.unpack(mask, num_units).numpy()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged_line(path, f"the line of step {line['step']}, layer {layer},", error) from error
