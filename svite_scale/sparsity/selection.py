"""The k-th smallest of many scores, exactly, in little memory: radix selection on the bits of floats.

``torch.topk`` holds a 16-byte (score, index) pair per score; this holds a chunk of them at a time, or none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svite_scale.sparsity import kernels
from svite_scale.sparsity.kernels.digits import DIGIT_BITS, NUM_DIGITS, float_of

CHUNK = 2**17
"""Scores looked at together, a multiple of 8."""


def kth_smallest(score: Tensor, mask: Tensor, k: int) -> float:
    """The k-th smallest score, counting from 1; a zero of either sign where that is a zero.

    Args:
        score: float32 or float64, ``[units]``, not NaN where the mask is set.
        mask: uint8, ``[ceil(units / 8)]``; units that aren't set don't count.
        k: 1 to the number of units that are.
    """
    leading = 8 * score.element_size() - DIGIT_BITS
    prefix: int | None = None
    for shift in range(leading, -1, -DIGIT_BITS):
        counts = torch.zeros(NUM_DIGITS, dtype=torch.int64, device=score.device)
        for part in parts(score.numel()):
            kernels.count_digits(score[part], mask[part.start // 8 : -(-part.stop // 8)], shift, prefix, counts)
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, k))
        k -= int(cumulative[digit - 1]) if digit else 0
        prefix = digit if prefix is None else prefix << DIGIT_BITS | digit
    assert prefix is not None, "a score has at least one digit"
    return float_of(prefix, score.dtype)


def parts(numel: int) -> Iterator[slice]:
    """Slices of up to ``CHUNK`` units, in order."""
    return (slice(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK))
