"""Sparsity as a parameterization: packed weights, and the engine that moves them.

A prunable weight is stored as its active ``values`` and a bit ``mask``, two ordinary parameters of its module, so that any
engine shards, gathers, reduces and optimizes active weights only.

- :func:`~svite_scale.sparsity.packing.sparsify` packs a dense model in place.
- :class:`~svite_scale.sparsity.topology.engine.TopologyEngine` prunes and grows on a schedule, through a
  :class:`~svite_scale.sparsity.access.ParameterAccess` that the engine in use provides.
- :func:`~svite_scale.sparsity.update.prune_and_grow` is the decision itself, a pure function.

Nothing here knows of timm, DeepSpeed or FSDP.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported at their first use, so that the options of this room are read without torch.
_HOMES = {
    "bits": "svite_scale.sparsity.bits",
    "cosine": "svite_scale.sparsity.topology.schedule",
    "erk": "svite_scale.sparsity.allocation.distributions",
    "prune_and_grow": "svite_scale.sparsity.update",
    "sparsify": "svite_scale.sparsity.packing",
    "uniform": "svite_scale.sparsity.allocation.distributions",
}
__all__ = ["bits", "cosine", "erk", "prune_and_grow", "sparsify", "uniform"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if name == "bits" else getattr(home, name)
