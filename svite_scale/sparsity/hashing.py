"""Random numbers hashed from their use, so that they are the same on every rank, device, world size and backend."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

INCREMENT, MULTIPLIER_1, MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)."""

CHUNK = 2**16
"""Positions hashed at a time, so that the integers take little memory beside their result."""


def hashed_uniform(seed: int, step: int, name: str, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns uniform random numbers hashed from (seed, step, name, flat position).

    Args:
        seed: of the run.
        step: optimizer step; 0 for what is drawn before training.
        name: of the layer.
        numel: positions, N.
        device: where to compute; it makes no difference to the numbers.

    Returns:
        float32 ``[N]`` in [0, 1), of 24 random bits each.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()[:8], "little", signed=True)
    numbers = torch.empty(numel, dtype=torch.float32, device=device)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        positions = torch.arange(start, stop, dtype=torch.int64, device=device)
        numbers[start:stop] = _shifted(_splitmix64(key, positions), 40)
    return numbers.mul_(2.0**-24)


def _splitmix64(key: int, positions: Tensor) -> Tensor:
    """Returns the generator's 64 bits at each position, int64; overwrites ``positions``."""
    state = positions.add_(1).mul_(_signed(INCREMENT)).add_(key)
    state.bitwise_xor_(_shifted(state, 30)).mul_(_signed(MULTIPLIER_1))
    state.bitwise_xor_(_shifted(state, 27)).mul_(_signed(MULTIPLIER_2))
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(state: Tensor, places: int) -> Tensor:
    """Returns a logical shift to the right; torch's own copies the sign bit."""
    return (state >> places) & ((1 << (64 - places)) - 1)


def _signed(constant: int) -> int:
    """Returns the int64 of the same bits; torch's int64 products wrap around as unsigned ones do."""
    return constant - (1 << 64) if constant >> 63 else constant
