"""The Triton kernels: on CPU tensors under Triton's interpreter, or compiled on a GPU.

test_triton_kernels.py runs these tests in a process of their own, because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svite_scale.sparsity.kernels import triton_kernels
from tests.sparsity.bit_patterns import BLOCK_EDGES, EDGES, Packed, assert_same_bits, packed_of, packed_weights

pytestmark = pytest.mark.slow  # compiled, Triton starts a compiler
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NUMELS = st.sampled_from(BLOCK_EDGES + EDGES) | st.integers(1, 5000)


def on_device(packed: Packed) -> Packed:
    return Packed(**{name: tensor.to(DEVICE) for name, tensor in vars(packed).items()})


@settings(deadline=None)  # the first example compiles
@given(packed=packed_weights(NUMELS))
def test_it_moves_the_bits_that_numpy_moves(packed: Packed) -> None:
    packed = on_device(packed)
    assert_same_bits(triton_kernels.expand(packed.values, packed.mask, packed.dense.shape), packed.expanded)
    assert_same_bits(triton_kernels.compress(packed.dense, packed.mask, packed.values.numel()), packed.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_blocks_of_a_matrix_that_isnt_contiguous(dtype: torch.dtype) -> None:
    packed = on_device(packed_of(131 * 177, 0.3, dtype, seed=1))
    dense = packed.dense.view(131, 177).t().contiguous().t()
    mask, values = (torch.stack([tensor, tensor], dim=1)[:, 1] for tensor in (packed.mask, packed.values))
    assert_same_bits(triton_kernels.expand(values, mask, dense.shape), packed.expanded.view(131, 177))
    assert_same_bits(triton_kernels.compress(dense, mask, values.numel()), packed.values)


@pytest.mark.parametrize("difference", [-3, 3])
def test_a_mask_of_another_count_stays_inside_the_buffers(difference: int) -> None:
    """Buffers are slices of longer ones: what lies beside them is neither read nor written."""
    packed = on_device(packed_of(5000, 0.3, torch.float32, seed=2))
    k = packed.values.numel()
    longer = torch.cat([packed.values, torch.full((8,), torch.nan, device=DEVICE)])
    expanded = triton_kernels.expand(longer[: k + difference], packed.mask, packed.dense.shape)
    positions = packed.expanded.view(torch.int32).nonzero().flatten()
    expected = packed.expanded.clone()
    if difference < 0:
        expected[positions[difference:]] = 0
    assert_same_bits(expanded, expected)
    common = min(k, k + difference)
    compressed = triton_kernels.compress(packed.dense, packed.mask, k + difference)
    assert compressed.shape == (k + difference,)
    assert_same_bits(compressed[:common], packed.values[:common])


def test_an_empty_weight() -> None:
    none = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    assert triton_kernels.expand(torch.empty(0, device=DEVICE), none, torch.Size((0, 3))).shape == (0, 3)
    assert triton_kernels.compress(torch.empty(0, 3, device=DEVICE), none, 0).shape == (0,)


def test_trying_out_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels.try_out(torch.device(DEVICE))
    right = triton_kernels.compress
    monkeypatch.setattr(triton_kernels, "compress", lambda *arguments: right(*arguments).roll(1))
    with pytest.raises(RuntimeError, match=r"wrong result for torch\.float32"):
        triton_kernels.try_out(torch.device(DEVICE))
