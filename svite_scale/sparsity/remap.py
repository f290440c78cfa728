"""Carrying packed tensors from one topology to the next."""

from __future__ import annotations

import torch
from torch import Tensor

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_inf"})
"""Names that torch's Adam family gives to its running gradient magnitudes."""


def remap_values(values: Tensor, active: Tensor, topology: Tensor, fill: float | Tensor = 0.0) -> Tensor:
    """The packed tensor of ``topology``: positions that were active keep their value, new ones get ``fill``.

    Args:
        values: ``[active.sum()]`` in ascending position of ``active``.
        active: bool ``[N]``, the old topology.
        topology: bool ``[N]``, the new one.
        fill: what new positions get.

    Returns:
        Like ``values``, ``[topology.sum()]``.
    """
    dense = torch.empty(active.numel(), dtype=values.dtype, device=values.device).copy_(torch.as_tensor(fill))
    return dense.masked_scatter_(active, values).masked_select(topology)


def remap_moments(moments: dict[str, Tensor], active: Tensor, topology: Tensor, grown: str) -> dict[str, Tensor]:
    """Optimizer state of ``topology``: what stays active keeps its moments, dropped weights' vanish with them.

    Args:
        moments: elementwise state by name, each ``[active.sum()]``.
        active: bool ``[N]``, the old topology.
        topology: bool ``[N]``, the new one.
        grown: ``mean`` starts a grown weight's second moment at its layer's mean; ``zero`` at 0. A zero second moment makes
            the first Adam steps of the grown weight about three times too large.
    """
    return {
        name: remap_values(moment, active, topology, moment.mean() if grown == "mean" and name in SECOND_MOMENTS else 0.0)
        for name, moment in moments.items()
    }
