"""The k-th smallest of many scores, exactly.

On the CPU it is found in little memory, by radix selection on the bits of floats: ``torch.topk`` holds a 16-byte (score, index)
pair per score, this holds a chunk of them at a time, or none. On a GPU each chunk would cost launches and a wait of the host,
which take many times as long as sorting all scores at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svite_scale.sparsity import bits, kernels
from svite_scale.sparsity.kernels.digits import DIGIT_BITS, NUM_DIGITS, float_of

CHUNK = 2**17
"""Scores that the CPU looks at together, a multiple of 8."""


def kth_smallest(score: Tensor, mask: Tensor, k: int) -> float:
    """The k-th smallest score, counting from 1; a zero of either sign where that is a zero.

    Args:
        score: float32 or float64, ``[units]``, not NaN where the mask is set.
        mask: uint8, ``[ceil(units / 8)]``; units that aren't set don't count.
        k: 1 to the number of units that are.
    """
    if not on_cpu(score):
        return float(score[bits.unpack(mask, score.numel())].sort().values[k - 1])
    leading = 8 * score.element_size() - DIGIT_BITS
    prefix: int | None = None
    for shift in range(leading, -1, -DIGIT_BITS):
        counts = torch.zeros(NUM_DIGITS, dtype=torch.int64, device=score.device)
        for part in parts(score):
            kernels.count_digits(score[part], mask[part.start // 8 : -(-part.stop // 8)], shift, prefix, counts)
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, k))
        k -= int(cumulative[digit - 1]) if digit else 0
        prefix = digit if prefix is None else prefix << DIGIT_BITS | digit
    assert prefix is not None, "a score has at least one digit"
    return float_of(prefix, score.dtype)


def parts(units: Tensor) -> Iterator[slice]:
    """Slices of a tensor ``[units]``, in order: of up to ``CHUNK`` units on the CPU, else a single one of all."""
    numel = units.numel()
    step = CHUNK if on_cpu(units) else max(numel, 1)
    return (slice(start, min(start + step, numel)) for start in range(0, numel, step))


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
