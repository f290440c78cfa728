"""Masks as bits: bit i of byte j is flat position 8j + i."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from svite_scale.sparsity.sharding import padded

GATHER_BITS = 0x0102040810204080
"""Times eight bools in memory order, read as an int64: its highest byte has bool i as bit i, and nothing carries into it."""


def num_bytes(numel: int) -> int:
    """Returns the bytes that a mask of ``numel`` positions takes."""
    return -(-numel // 8)


def check_size(bits: Tensor, numel: int) -> None:
    """Refuses, with a ``ValueError``, what can't be the packed mask of ``numel`` positions."""
    if bits.dtype != torch.uint8 or bits.numel() != num_bytes(numel):
        raise ValueError(f"{numel} positions need {num_bytes(numel)} uint8, not {bits.numel()} {bits.dtype}")


def check_count(found: int, num_active: int) -> None:
    """Refuses, with a ``ValueError``, a mask with ``found`` active positions where ``num_active`` are due."""
    if found != num_active:
        raise ValueError(f"the mask has {found} active positions, not {num_active}")


def pack(mask: Tensor) -> Tensor:
    """Packs a mask into bits.

    Args:
        mask: bool, ``[numel]``, of any stride.

    Returns:
        uint8, ``[ceil(numel / 8)]``; the bits past ``numel`` are 0.
    """
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise ValueError(f"pack needs a 1-D bool mask, not {mask.dtype} of shape {tuple(mask.shape)}")
    eights = padded(mask, num_bytes(mask.numel()) * 8)
    if eights.storage_offset() % 8 or not eights.is_contiguous():
        eights = eights.clone(memory_format=torch.contiguous_format)  # a slice can't be read eight bools at a time
    return (eights.view(torch.int64) * GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Unpacks bits into a mask; the inverse of :func:`pack`.

    Args:
        bits: uint8, ``[ceil(numel / 8)]``.
        numel: positions in the mask.

    Returns:
        bool, ``[numel]``.
    """
    check_size(bits, numel)
    # One 8-byte look-up per byte of mask writes eight bools at once.
    return _eight_bools(bits.device)[bits.int()].view(torch.bool)[:numel]


@lru_cache(maxsize=16)
def _eight_bools(device: torch.device) -> Tensor:
    """int64 ``[256]`` whose entry b holds the bits of byte b as eight bools in memory order."""
    byte = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return ((byte >> bit) & 1).to(torch.bool).view(torch.int64).flatten()
