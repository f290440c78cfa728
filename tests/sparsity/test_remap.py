"""Carrying packed tensors from one topology to the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svite_scale.sparsity.remap import remap_moments, remap_values

OLD = torch.tensor([True, False, True, True, False, False])
NEW = torch.tensor([False, True, True, False, False, True])
"""Positions 0 and 3 go, 1 and 5 come, 2 stays."""


def test_what_stays_keeps_its_value_and_what_comes_gets_the_fill() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    assert remap_values(values, OLD, NEW).tolist() == [0, 2, 0]
    assert remap_values(values, OLD, NEW, fill=7.0).tolist() == [7, 2, 7]
    assert remap_values(values, OLD, NEW, fill=values.mean()).tolist() == [2, 2, 2]
    assert remap_values(values, OLD, OLD, fill=7.0).tolist() == [1, 2, 3]
    assert values.tolist() == [1, 2, 3], "the argument is left as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert remap_values(torch.ones(3, dtype=dtype), OLD, NEW, fill=torch.tensor(0.5)).dtype == dtype


@given(state=st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(allow_nan=False, width=32)), min_size=1, max_size=50))
def test_remap_is_that_of_a_dense_tensor(state: list[tuple[bool, bool, float]]) -> None:
    old, new, values = map(list, zip(*state, strict=True))
    packed = torch.tensor([value for value, active in zip(values, old, strict=True) if active])
    expected = [value if was else 9.0 for was, now, value in state if now]
    assert remap_values(packed, torch.tensor(old), torch.tensor(new), fill=9.0).tolist() == expected


MOMENTS = {
    "exp_avg": torch.tensor([1.0, 2.0, 3.0]),
    "exp_avg_sq": torch.tensor([1.0, 4.0, 10.0]),
    "max_exp_avg_sq": torch.tensor([2.0, 4.0, 12.0]),
    "exp_inf": torch.tensor([3.0, 3.0, 9.0]),
}
TABLE = {
    "mean": {"exp_avg": [0, 2, 0], "exp_avg_sq": [5, 4, 5], "max_exp_avg_sq": [6, 4, 6], "exp_inf": [5, 3, 5]},
    "zero": {"exp_avg": [0, 2, 0], "exp_avg_sq": [0, 4, 0], "max_exp_avg_sq": [0, 4, 0], "exp_inf": [0, 3, 0]},
}


@pytest.mark.parametrize("grown", TABLE)
def test_moments_of_grown_weights(grown: str) -> None:
    remapped = remap_moments(MOMENTS, OLD, NEW, grown)
    assert {name: moment.tolist() for name, moment in remapped.items()} == TABLE[grown]


def test_no_moments_stay_none() -> None:
    assert remap_moments({}, OLD, NEW, "mean") == {}
