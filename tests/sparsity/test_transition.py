"""Carrying packed tensors from one topology to the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.transition import TopologyTransition, grown_moment

OLD = torch.tensor([True, False, True, True, False, False])
NEW = torch.tensor([False, True, True, False, False, True])
"""Positions 0 and 3 go, 1 and 5 come, 2 stays."""


def remap_of(old: Tensor, new: Tensor) -> TopologyTransition:
    return TopologyTransition(bits.pack(old), bits.pack(new), torch.Size([old.numel()]), int(old.sum()))


def test_what_stays_keeps_its_value_and_what_comes_gets_the_fill() -> None:
    values, remap = torch.tensor([1.0, 2.0, 3.0]), remap_of(OLD, NEW)
    assert remap.kept.tolist() == [False, True, False]
    assert remap.remap(values).tolist() == [0, 2, 0]
    assert remap.remap(values, 7.0).tolist() == [7, 2, 7]
    assert remap.remap(values, values.mean()).tolist() == [2, 2, 2]
    assert remap.remap(torch.tensor([True, True, False]), False).tolist() == [False, True, False]
    assert remap.remap(torch.tensor([True, False, True]), False).tolist() == [False, False, False]
    assert remap_of(OLD, OLD).remap(values, 7.0).tolist() == [1, 2, 3]
    assert values.tolist() == [1, 2, 3], "the argument is left as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert remap_of(OLD, NEW).remap(torch.ones(3, dtype=dtype), torch.tensor(0.5)).dtype == dtype


@given(state=st.lists(st.tuples(st.booleans(), st.floats(allow_nan=False, width=32)), min_size=1, max_size=50), data=st.data())
def test_remap_is_that_of_a_dense_tensor(state: list[tuple[bool, float]], data: st.DataObject) -> None:
    old, values = map(list, zip(*state, strict=True))
    new = data.draw(st.permutations(old))
    packed = torch.tensor([value for value, active in zip(values, old, strict=True) if active])
    remap = remap_of(torch.tensor(old), torch.tensor(new))
    assert remap.kept.tolist() == [was for was, now in zip(old, new, strict=True) if now]
    expected = [value if was else 9.0 for was, now, value in zip(old, new, values, strict=True) if now]
    assert remap.remap(packed, 9.0).tolist() == expected


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
    remap = remap_of(OLD, NEW)
    found = {name: remap.remap(moment, grown_moment(name, moment, grown)).tolist() for name, moment in MOMENTS.items()}
    assert found == TABLE[grown]


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_of_units_move_as_the_weights_of_a_dense_tensor_do(repeats: int) -> None:
    remap = remap_of(OLD, NEW)
    dense = torch.arange(repeats * 6 * 2.0).view(repeats, 6, 2) + 1
    born = -torch.arange(repeats * 2 * 2.0).view(repeats, 2, 2) - 1
    expected = dense.clone()
    expected[:, [1, 5]] = born
    packed = dense[:, OLD].reshape(repeats * 3, 2)
    assert torch.equal(remap.remap_rows(packed, repeats, born), expected[:, NEW].reshape(repeats * 3, 2))
    assert remap.remap_rows(packed, repeats).view(repeats, 3, 2)[:, [0, 2]].count_nonzero() == 0
    assert remap.grown_units().tolist() == [1, 5]
