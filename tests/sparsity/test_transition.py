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
"""Positions 0 and 3 are dropped, 1 and 5 grown, 2 is kept."""


def transition_of(old: Tensor, new: Tensor) -> TopologyTransition:
    return TopologyTransition(bits.pack(old), bits.pack(new), torch.Size([old.numel()]), int(old.sum()))


def test_remap_copies_kept_units_and_fills_grown_ones() -> None:
    values, transition = torch.tensor([1.0, 2.0, 3.0]), transition_of(OLD, NEW)
    assert transition.kept.tolist() == [False, True, False]
    assert transition.remap(values).tolist() == [0, 2, 0]
    assert transition.remap(values, 7.0).tolist() == [7, 2, 7]
    assert transition.remap(values, values.mean()).tolist() == [2, 2, 2]
    assert transition.remap(torch.tensor([True, True, False]), False).tolist() == [False, True, False]
    assert transition.remap(torch.tensor([True, False, True]), False).tolist() == [False, False, False]
    assert transition_of(OLD, OLD).remap(values, 7.0).tolist() == [1, 2, 3]
    assert values.tolist() == [1, 2, 3], "the argument is left as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_remap_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert transition_of(OLD, NEW).remap(torch.ones(3, dtype=dtype), torch.tensor(0.5)).dtype == dtype


@given(state=st.lists(st.tuples(st.booleans(), st.floats(allow_nan=False, width=32)), min_size=1, max_size=50), data=st.data())
def test_remap_is_that_of_a_dense_tensor(state: list[tuple[bool, float]], data: st.DataObject) -> None:
    old, values = map(list, zip(*state, strict=True))
    new = data.draw(st.permutations(old))
    packed = torch.tensor([value for value, active in zip(values, old, strict=True) if active])
    transition = transition_of(torch.tensor(old), torch.tensor(new))
    assert transition.kept.tolist() == [was for was, now in zip(old, new, strict=True) if now]
    expected = [value if was else 9.0 for was, now, value in zip(old, new, values, strict=True) if now]
    assert transition.remap(packed, 9.0).tolist() == expected


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
    transition = transition_of(OLD, NEW)
    found = {name: transition.remap(moment, grown_moment(name, moment, grown)).tolist() for name, moment in MOMENTS.items()}
    assert found == TABLE[grown]


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_of_units_move_as_the_weights_of_a_dense_tensor_do(repeats: int) -> None:
    transition = transition_of(OLD, NEW)
    dense = torch.arange(repeats * 6 * 2.0).view(repeats, 6, 2) + 1
    initial = -torch.arange(repeats * 2 * 2.0).view(repeats, 2, 2) - 1
    expected = dense.clone()
    expected[:, [1, 5]] = initial
    packed = dense[:, OLD].reshape(repeats * 3, 2)
    assert torch.equal(transition.remap_rows(packed, repeats, initial), expected[:, NEW].reshape(repeats * 3, 2))
    assert transition.remap_rows(packed, repeats).view(repeats, 3, 2)[:, [0, 2]].count_nonzero() == 0
    assert transition.grown_units().tolist() == [1, 5]
