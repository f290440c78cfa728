"""Random packed weights as bit patterns, and what NumPy makes of them: the yardstick of all kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from svite_scale.sparsity import bits

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
EDGES = (1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513)
BLOCK_EDGES = (2040, 2047, 2048, 2049, 2056, 4095, 4096, 4097, 6151)


@dataclass
class Packed:
    """A dense tensor of random bits, its active elements, and both as NumPy has them.

    Attributes:
        dense: ``[numel]``, with elements where inactive too.
        mask: uint8, ``[ceil(numel / 8)]``; the bits past ``numel`` are random.
        values: ``[k]``, the active elements of ``dense``.
        expanded: ``values`` where active, else 0.
    """

    dense: Tensor
    mask: Tensor
    values: Tensor
    expanded: Tensor


def packed_of(numel: int, density: float, dtype: torch.dtype, seed: int) -> Packed:
    """Any bits at all are elements: NaNs of every payload, infinities, negative zeros."""
    generator = np.random.default_rng(seed)
    integers = torch.empty(0, dtype=INTEGERS[dtype]).numpy().dtype
    dense = np.frombuffer(generator.bytes(numel * integers.itemsize), dtype=integers).copy()
    chosen = generator.random(bits.num_bytes(numel) * 8) < density
    mask = np.packbits(chosen, bitorder="little")
    active = np.unpackbits(mask, bitorder="little")[:numel].astype(bool)
    expanded = np.array([element if is_active else 0 for element, is_active in zip(dense, active, strict=True)], dtype=integers)
    values = np.array([element for element, is_active in zip(dense, active, strict=True) if is_active], dtype=integers)
    tensors = [torch.from_numpy(array).view(dtype) for array in (dense, values, expanded)]
    return Packed(tensors[0], torch.from_numpy(mask), tensors[1], tensors[2])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape, actual.device) == (expected.dtype, expected.shape, expected.device)
    integers = INTEGERS[actual.dtype]
    assert torch.equal(actual.contiguous().view(integers), expected.contiguous().view(integers))


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DENSITIES = st.sampled_from([0.0, 1.0, 0.01, 0.3, 0.97]) | st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)
NUMELS = st.sampled_from(EDGES) | st.integers(1, 700)


def packed_weights(numels: st.SearchStrategy[int] = NUMELS) -> st.SearchStrategy[Packed]:
    return st.builds(packed_of, numels, DENSITIES, DTYPES, SEEDS)
