"""Sparsity as a parameterization: packed weights, and the engine that moves them.

A prunable weight is stored as its active ``values`` and a bit ``mask``, two ordinary parameters of its module, so that any
engine shards, gathers, reduces and optimizes active weights only.

- :func:`~svite_scale.sparsity.sparsify.sparsify` packs a dense model in place.
- :class:`~svite_scale.sparsity.topology.TopologyEngine` prunes and grows on a schedule, through a
  :class:`~svite_scale.sparsity.access.ParameterAccess` that the engine in use provides.
- :func:`~svite_scale.sparsity.update.prune_and_grow` is the decision itself, a pure function.

Nothing here knows of timm, DeepSpeed or FSDP.
"""

from __future__ import annotations

from svite_scale.sparsity import bits
from svite_scale.sparsity.distributions import erk, uniform
from svite_scale.sparsity.schedules import cosine
from svite_scale.sparsity.update import prune_and_grow

__all__ = ["bits", "cosine", "erk", "prune_and_grow", "uniform"]
