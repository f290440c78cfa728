"""One prune-and-grow decision, the same for elements, heads and neurons.

This pure function is the reference for everything distributed: given the same scores it returns the same topology, bit for
bit, on every rank, for every world size, on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svite_scale.errors import TopologyError


def prune_and_grow(active: Tensor, drop_score: Tensor, grow_score: Tensor, count: int) -> Tensor:
    """Drops ``count`` active units, then grows ``count`` inactive ones, those just dropped included.

    The active units with the smallest ``drop_score`` go; among the units inactive after that, those with the largest
    ``grow_score`` come. Ties break toward the lower index: of equal units, the lower index is dropped first, and grown first.
    Zeros of both signs are equal, infinities are ordinary scores.

    Args:
        active: bool, ``[units]``, unchanged.
        drop_score: float, ``[units]``; read where ``active``.
        grow_score: float, ``[units]``; read where inactive after the drop.
        count: units to drop and to grow, 0 to the number of active ones.

    Returns:
        bool, ``[units]``, with as many active units as before.

    Raises:
        TopologyError: a score that is read is NaN, or ``count`` is out of range.
    """
    active_positions = active.nonzero().squeeze(1)
    if not 0 <= count <= active_positions.numel():
        raise TopologyError(f"can't drop {count} of {active_positions.numel()} active units")
    dropped = active_positions[_extreme(drop_score[active_positions], count, largest=False, role="drop")]
    topology = active.clone()
    topology[dropped] = False
    candidates = (~topology).nonzero().squeeze(1)
    grown = candidates[_extreme(grow_score[candidates], count, largest=True, role="grow")]
    topology[grown] = True
    return topology


def _extreme(score: Tensor, count: int, *, largest: bool, role: str) -> Tensor:
    """Positions of the ``count`` smallest or largest scores, ties to the lower position, as int64 ``[count]``."""
    if score.isnan().any():
        raise TopologyError(f"{int(score.isnan().sum())} of {score.numel()} {role} scores are NaN")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    # topk leaves the choice among equals open, so it only yields the threshold; what ties with it is taken in order.
    chosen = torch.topk(score, count, largest=largest, sorted=False).values
    threshold = chosen.min() if largest else chosen.max()
    beyond = (score > threshold if largest else score < threshold).nonzero().squeeze(1)
    ties = (score == threshold).nonzero().squeeze(1)
    return torch.cat([beyond, ties[: count - beyond.numel()]])
