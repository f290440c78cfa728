"""Matrices in the sparse-bitmask layout, against numbers written by hand, and there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svite_scale.sparsity.bitmask_layout import BitmaskMatrix, decode, decode_state_dict, encode, encode_state_dict


def test_encode_is_the_layout_of_a_matrix_written_by_hand() -> None:
    weight = torch.tensor([[0.0, 2, 0, 0, 0, 0, 0, 0, 3, 4], [0.0] * 10, [5.0, 0, 0, 0, 0, 0, 0, -0.0, 0, 0]])
    active = weight != 0
    active[2, 7] = True
    matrix = encode(weight, active)
    assert matrix.shape.tolist() == [3, 10]
    assert matrix.compressed.tolist() == [2, 3, 4, 5, 0]
    assert matrix.bitmask.tolist() == [[0b00000010, 0b11], [0, 0], [0b10000001, 0]]
    assert matrix.row_offsets.tolist() == [0, 3, 3]
    assert [part.dtype for part in matrix] == [torch.int64, torch.float32, torch.uint8, torch.int64]


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_decode_gives_back_weight_and_mask_bit_by_bit(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, columns, generator=generator) < 0.4
    weight = torch.randn(rows, columns, generator=generator).to(dtype) * active
    weight[active & (torch.rand(rows, columns, generator=generator) < 0.2)] = -0.0
    found, found_active = decode(encode(weight, active))
    assert torch.equal(found, weight)
    assert torch.equal(found_active, active)
    assert torch.equal(found[active].view(torch.uint8), weight[active].view(torch.uint8))


def test_state_dict_keeps_other_tensors_and_stores_convolutions_as_matrices() -> None:
    state = {"conv.weight": torch.randn(4, 3, 2, 2), "conv.bias": torch.randn(4), "norm.weight": torch.randn(4)}
    active = torch.rand(4, 3, 2, 2) < 0.5
    state["conv.weight"] *= active
    encoded = encode_state_dict(state, {"conv.weight": active})
    assert encoded.keys() == {f"conv.{end}" for end in BitmaskMatrix._fields} | {"conv.bias", "norm.weight"}
    found, found_active = decode_state_dict(encoded)
    assert torch.equal(found["conv.weight"], state["conv.weight"].view(4, 12))
    assert torch.equal(found_active["conv.weight"], active.view(4, 12))
    assert found["norm.weight"] is state["norm.weight"]


def test_decode_refuses_bits_past_the_last_column_and_missing_tensors() -> None:
    matrix = encode(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="past the last column"):
        decode(matrix._replace(bitmask=matrix.bitmask | 0b1000))
    tensors = {f"fc.{end}": part for end, part in matrix._asdict().items() if end != "shape"}
    with pytest.raises(ValueError, match=r"^'?fc\.shape is missing$"):
        decode_state_dict(tensors)
