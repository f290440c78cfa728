"""Masks as bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svite_scale.sparsity.bits import num_bytes, pack, unpack

TABLE: list[tuple[str, list[int]]] = [
    ("", []),
    ("1", [1]),
    ("01", [2]),
    ("00000001", [128]),
    ("11111111", [255]),
    ("000000001", [0, 1]),
    ("1010000001", [5, 2]),
    ("0000000010000000011", [0, 1, 6]),
]


def mask_of(text: str) -> torch.Tensor:
    return torch.tensor([digit == "1" for digit in text], dtype=torch.bool)


@pytest.mark.parametrize(("text", "packed"), TABLE)
def test_bit_i_of_byte_j_is_position_8j_plus_i(text: str, packed: list[int]) -> None:
    bits = pack(mask_of(text))
    assert bits.dtype == torch.uint8
    assert bits.tolist() == packed
    assert unpack(bits, len(text)).tolist() == mask_of(text).tolist()


@given(mask=st.lists(st.booleans(), max_size=100))
def test_bits_are_numpys_in_little_order(mask: list[bool]) -> None:
    bits = pack(torch.tensor(mask, dtype=torch.bool))
    assert bits.tolist() == np.packbits(np.array(mask, dtype=bool), bitorder="little").tolist()
    assert bits.numel() == num_bytes(len(mask))
    restored = unpack(bits, len(mask))
    assert restored.dtype == torch.bool
    assert restored.tolist() == mask


@pytest.mark.parametrize("part", [slice(1, 17), slice(3, 19), slice(0, 32, 2), slice(1, 9), slice(2, 30, 3)])
def test_a_part_of_a_mask_is_packed_as_a_mask_of_its_own(part: slice) -> None:
    whole = mask_of("10110011100001011010111000110100")
    assert pack(whole[part]).tolist() == pack(torch.tensor(whole.tolist()[part])).tolist()


@given(packed=st.lists(st.integers(0, 255), min_size=1, max_size=9), missing=st.integers(0, 7))
def test_bits_past_the_last_position_are_ignored(packed: list[int], missing: int) -> None:
    numel = 8 * len(packed) - missing
    expected = np.unpackbits(np.array(packed, dtype=np.uint8), bitorder="little")[:numel].astype(bool)
    assert unpack(torch.tensor(packed, dtype=torch.uint8), numel).tolist() == expected.tolist()


def test_unpacking_changes_no_later_result() -> None:
    first = unpack(pack(mask_of("10101010")), 8)
    first.fill_(False)
    assert unpack(pack(mask_of("10101010")), 8).tolist() == mask_of("10101010").tolist()


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.bool)])
def test_pack_refuses_what_is_no_mask(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="1-D bool mask"):
        pack(mask)


@pytest.mark.parametrize(("bits", "numel"), [(torch.zeros(2, dtype=torch.uint8), 17), (torch.zeros(1), 8)])
def test_unpack_refuses_bytes_that_dont_fit(bits: torch.Tensor, numel: int) -> None:
    with pytest.raises(ValueError, match=f"{numel} positions need"):
        unpack(bits, numel)
