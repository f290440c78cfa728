"""One prune-and-grow decision, the same for weights, blocks, heads and neurons.

These pure functions are the reference for everything distributed: given the same scores they return the same topology, bit
for bit, on every rank, for every world size, on every backend.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits, kernels

CHUNK = 2**18
"""Scores whose ties are found at once."""


class Selection(NamedTuple):
    """One half of an update.

    Attributes:
        active: bool ``[units]``, afterwards.
        threshold: the largest score that was dropped, or the smallest that was grown; None where ``count`` was 0.
    """

    active: Tensor
    threshold: float | None


def prune_and_grow(
    active: Tensor, drop_score: Tensor, grow_score: Tensor, count: int, protected: Tensor | None = None
) -> Tensor:
    """Drops ``count`` active units, then grows ``count`` inactive ones, those just dropped included.

    The active units with the smallest ``drop_score`` are dropped. Of the units inactive after that, those with the largest
    ``grow_score`` are grown. Ties break toward the lower index: of equal units, the lower index is dropped first, and grown
    first. Zeros of both signs are equal, infinities are ordinary scores.

    Args:
        active: bool, ``[units]``, unchanged.
        drop_score: of any real dtype, ``[units]``; read where ``active``.
        grow_score: the same; read where inactive after the drop.
        count: units to drop and to grow, 0 to the number of active ones.
        protected: bool, ``[units]``; of these, only as many are dropped as ``count`` exceeds the other active ones. None
            protects no unit.

    Returns:
        bool, ``[units]``, with as many active units as before.

    Raises:
        TopologyError: a score that is read is NaN, scores are of another shape, or ``count`` is out of range.
    """
    return grow(drop(active, drop_score, count, protected).active, grow_score, count).active


def drop(active: Tensor, score: Tensor, count: int, protected: Tensor | None = None) -> Selection:
    """Does the first half of :func:`prune_and_grow`: drops the ``count`` active units of smallest ``score``."""
    if protected is not None:
        return _drop_protected_last(active, score, count, protected)
    chosen, threshold = choose(active, score, count, "drop")
    return Selection(chosen.logical_xor_(active), threshold)


def _drop_protected_last(active: Tensor, score: Tensor, count: int, protected: Tensor) -> Selection:
    others = active & ~protected
    num_others = min(count, int(others.count_nonzero()))
    first = drop(others, score, num_others)
    last = drop(active & protected, score, count - num_others)
    dropped = [each.threshold for each in (first, last) if each.threshold is not None]
    return Selection(first.active.logical_or_(last.active), max(dropped, default=None))


def grow(active: Tensor, score: Tensor, count: int) -> Selection:
    """Does the second half of :func:`prune_and_grow`: grows the ``count`` inactive units of largest ``score``."""
    chosen, threshold = choose(~active, score, count, "grow")
    return Selection(chosen.logical_or_(active), threshold)


def choose(eligible: Tensor, score: Tensor, count: int, role: Literal["drop", "grow"]) -> tuple[Tensor, float | None]:
    """Chooses the eligible units that :func:`drop` or :func:`grow` moves: those of smallest, or of largest, score.

    Returns:
        The chosen units as a new bool ``[units]``, and the last score chosen, None where ``count`` is 0.
    """
    if score.shape != eligible.shape:
        raise TopologyError(f"{role} scores must be of shape {tuple(eligible.shape)}, not {tuple(score.shape)}")
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float() if score.is_floating_point() else score.double()
    available, largest = int(eligible.count_nonzero()), role == "grow"
    if not 0 <= count <= available:
        raise TopologyError(f"can't {role} {count} of {available} {'inactive' if largest else 'active'} units")
    check_no_nan(score, eligible, role)
    if count == 0:
        return torch.zeros_like(eligible), None

    rank = available - count + 1 if largest else count
    # In one expression, so that the copy of the candidates' scores is gone afterwards.
    threshold = kth_smallest(kernels.compress(score, bits.pack(eligible), available), rank)
    chosen = (score > threshold if largest else score < threshold).logical_and_(eligible)
    ties = (score == threshold).logical_and_(eligible)
    missing = count - int(chosen.count_nonzero())
    # In chunks, because the positions of many equal scores, 8 bytes each, would take more than the scores.
    for chosen_chunk, tied_chunk in zip(chosen.split(CHUNK), ties.split(CHUNK), strict=True):
        if not missing:
            break
        first = tied_chunk.nonzero().squeeze(1)[:missing]
        chosen_chunk[first] = True
        missing -= first.numel()
    return chosen, threshold


def kth_smallest(scores: Tensor, k: int) -> float:
    """Returns the k-th smallest of some scores, counted from 1. Puts them in another order.

    Args:
        scores: float32 or float64, contiguous, without NaN.
        k: 1 to the number of scores.
    """
    if scores.device.type != "cpu":
        return float(scores.sort().values[k - 1])
    # Torch's sort, topk and kthvalue would hold an index of 8 bytes for each score.
    ordered = scores.numpy()
    ordered.partition(k - 1)
    return float(ordered[k - 1])


def check_no_nan(score: Tensor, eligible: Tensor, role: str) -> None:
    """Refuses, with a :class:`TopologyError`, a NaN among the eligible units' scores."""
    # The sum is NaN if a score is, and takes no memory.
    if not score.sum().isnan():
        return
    num_nan = int(score.isnan().logical_and_(eligible).count_nonzero())
    if num_nan:
        raise TopologyError(f"{num_nan} of {int(eligible.count_nonzero())} {role} scores are NaN")
