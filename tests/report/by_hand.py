"""What is in a run directory, read without svite_scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

NUM_UNITS = {"heads": 8, "neurons": 128}
"""Of each of the two blocks."""


def tensors(checkpoint: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The model's flat tensors, by parameter name."""
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith("model/")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix("model/"): tensor.numpy() for name, tensor in state.items()}


def unpacked(packed: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    return np.unpackbits(packed, count=count, bitorder="little").astype(bool)


def unit_masks(checkpoint: Path) -> dict[str, np.ndarray[Any, Any]]:
    """By layer, which units are active, bool ``[N]``."""
    masks = {}
    for name, tensor in tensors(checkpoint).items():
        if name.endswith(".mask"):
            unit = "heads" if ".attn." in name else "neurons"
            masks[f"{name.removesuffix('.mask')}.{unit}"] = unpacked(tensor, NUM_UNITS[unit])
    return masks
