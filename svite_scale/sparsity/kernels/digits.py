"""Digits of floats, for radix selection: their bits as unsigned integers in the order of the floats, 16 bits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

DIGIT_BITS = 16
NUM_DIGITS = 2**DIGIT_BITS
KEY_TYPES = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers of the same size, for the bits of each type of float."""


def count_digits(floats: Tensor, shift: int, prefix: int | None) -> Tensor:
    """How many floats have each digit.

    Args:
        floats: float32 or float64, ``[n]``.
        shift: the digit's lowest bit in the key.
        prefix: count those alone whose key has these bits above the digit; None for the leading digit, which has none above.

    Returns:
        int64, ``[65536]``.
    """
    digits = _signed_keys(floats.view(KEY_TYPES[floats.dtype])) >> shift
    half = 2 ** (8 * floats.element_size() - shift - 1)
    if prefix is None:
        digits += half
    else:
        digits = digits[(digits >> DIGIT_BITS) == prefix - half // NUM_DIGITS] & (NUM_DIGITS - 1)
    return torch.bincount(digits, minlength=NUM_DIGITS)


def float_of(key: int, dtype: torch.dtype) -> float:
    """The float with this key."""
    bits = KEY_TYPES[dtype]
    signed = torch.tensor([key + torch.iinfo(bits).min], dtype=bits)
    return float(_signed_keys(signed).view(dtype))


def _signed_keys(bits: Tensor) -> Tensor:
    """From the bits of floats to signed integers in the order of the floats, and back: negative floats fall as bits rise."""
    info = torch.iinfo(bits.dtype)
    return (bits >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits)
