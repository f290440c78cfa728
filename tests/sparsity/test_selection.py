"""The k-th smallest score, against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svite_scale.sparsity import bits, selection
from svite_scale.sparsity.selection import kth_smallest

INF, DENORMAL = float("inf"), 2.0**-149
SPECIAL = st.sampled_from([0.0, -0.0, DENORMAL, -DENORMAL, 1.0, 1.0 + 2**-23, 1.0 + 2**-22, -1.0, 3e38, INF, -INF])
SCORES = st.lists(st.tuples(SPECIAL | st.floats(width=32, allow_nan=False), st.booleans()), min_size=1, max_size=70)


def kth(scores: torch.Tensor, counted: list[bool], k: int) -> float:
    return kth_smallest(scores, bits.pack(torch.tensor(counted)), k)


@settings(max_examples=300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(units=SCORES.filter(lambda units: any(counted for _, counted in units)), data=st.data())
def test_it_is_the_kth_of_the_sorted_scores(dtype: torch.dtype, units: list[tuple[float, bool]], data: st.DataObject) -> None:
    scores, counted = torch.tensor([score for score, _ in units], dtype=dtype), [counted for _, counted in units]
    among = sorted(score for score, counts in zip(scores.tolist(), counted, strict=True) if counts)
    k = data.draw(st.integers(1, len(among)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", data.draw(st.sampled_from([8, 16, 128])))
        assert kth(scores, counted, k) == among[k - 1]


@given(scores=st.lists(st.floats(allow_nan=False), min_size=1, max_size=50), data=st.data())
def test_all_bits_of_a_double_count(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    assert kth(torch.tensor(scores, dtype=torch.float64), [True] * len(scores), k) == sorted(scores)[k - 1]


def test_many_scores_of_few_values() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-5, 5, (300_000,), generator=generator).float() / 3
    ordered = sorted(scores.tolist())
    for k in (1, 9_999, 150_000, 300_000):
        assert kth(scores, [True] * 300_000, k) == ordered[k - 1]


def test_scores_that_dont_count_may_be_nan() -> None:
    assert kth(torch.tensor([float("nan"), 2.0, 1.0]), [False, True, True], 1) == 1.0


def test_the_scores_stay_as_they_were() -> None:
    scores = torch.tensor([2.0, -0.0, -1.0])
    kth(scores, [True] * 3, 2)
    assert str(scores.tolist()) == "[2.0, -0.0, -1.0]"


@given(units=SCORES.filter(lambda units: any(counted for _, counted in units)), data=st.data())
def test_a_gpu_sorts_where_the_cpu_counts_digits(units: list[tuple[float, bool]], data: st.DataObject) -> None:
    scores, counted = torch.tensor([score for score, _ in units]), [counted for _, counted in units]
    k = data.draw(st.integers(1, sum(counted)))
    found = kth(scores, counted, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "on_cpu", lambda tensor: False)
        assert [*selection.parts(scores)] == [slice(0, len(units))]
        assert kth(scores, counted, k) == found
