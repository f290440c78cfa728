"""The prune-and-grow decision, against literal tables and against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svite_scale import sparsity
from svite_scale.errors import TopologyError
from svite_scale.sparsity.update import drop, prune_and_grow
from tests import reference

INF, NAN = float("inf"), float("nan")
DENORMAL = 2.0**-149
TABLE = [
    # active, drop scores, grow scores, count, the new topology
    ("1100", [1, 2, 9, 9], [0, 0, 1, 2], 1, "0101"),
    ("1100", [2, 1, 9, 9], [0, 0, 2, 1], 1, "1010"),
    # nothing moves
    ("1010", [1, 1, 1, 1], [1, 1, 1, 1], 0, "1010"),
    # of equal active units the lower is dropped, of equal inactive ones the lower is grown
    ("011100", [5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 3, 3], 1, "001110"),
    ("000111", [5, 5, 5, 5, 5, 5], [3, 3, 3, 0, 0, 0], 2, "110001"),
    # what was just dropped may come back, and does at a tie if it stands lower
    ("0110", [0, 1, 2, 0], [0, 7, 0, 6], 1, "0110"),
    ("0110", [0, 1, 2, 0], [0, 7, 0, 7], 1, "0110"),
    ("0011", [0, 0, 1, 2], [0, 7, 7, 0], 1, "0101"),
    # everything is dropped
    ("1100", [1, 2, 0, 0], [0, 0, 1, 1], 2, "0011"),
    ("1111", [4, 3, 2, 1], [0, 0, 0, 0], 4, "1111"),
    # zeros of both signs are equal
    ("1100", [0.0, -0.0, 0, 0], [0, 0, -0.0, 0.0], 1, "1100"),
    ("1100", [-0.0, 0.0, 0, 0], [-1, 0, 0.0, -0.0], 1, "0110"),
    ("1100", [0.0, -0.0, 0, 0], [-1, 0, -0.0, 0.0], 1, "0110"),
    # denormals and infinities are ordinary scores
    ("1100", [DENORMAL, 0.0, 0, 0], [0, 0, 0, DENORMAL], 1, "1001"),
    ("1100", [INF, 1e38, 0, 0], [0, 0, 1e38, INF], 1, "1001"),
    ("1100", [INF, INF, 0, 0], [0, 0, INF, INF], 1, "0110"),
    ("1100", [-INF, INF, 0, 0], [-INF, 0, -INF, -INF], 1, "1100"),
]


PROTECTED = [
    # active, protected, drop scores, count, the largest score that is dropped, what stays active
    ("1110", "1000", [1, 3, 2, 0], 1, 2.0, "1100"),
    ("1110", "1000", [1, 3, 2, 0], 2, 3.0, "1000"),
    # too few others: of the protected ones those of smallest score
    ("1111", "1110", [3, 2, 1, 9], 2, 9.0, "1100"),
    ("1111", "1111", [2, 2, 1, 3], 2, 2.0, "0101"),
    ("1100", "1000", [5, 1, 0, 0], 2, 5.0, "0000"),
    # an inactive unit has no need of it
    ("1100", "0011", [2, 1, 0, 0], 1, 1.0, "1000"),
    ("1100", "1100", [2, 1, 0, 0], 0, None, "1100"),
]


def bools(text: str) -> torch.Tensor:
    return torch.tensor([digit == "1" for digit in text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("active", "drop", "grow", "count", "topology"), TABLE)
def test_scores_to_topology(
    active: str, drop: list[float], grow: list[float], count: int, topology: str, dtype: torch.dtype
) -> None:
    new = prune_and_grow(bools(active), torch.tensor(drop, dtype=dtype), torch.tensor(grow, dtype=dtype), count)
    assert new.dtype == torch.bool
    assert new.tolist() == bools(topology).tolist()


@pytest.mark.parametrize(("active", "protected", "score", "count", "threshold", "left"), PROTECTED)
def test_protected_units_are_dropped_last(
    active: str, protected: str, score: list[float], count: int, threshold: float | None, left: str
) -> None:
    found = drop(bools(active), torch.tensor(score), count, bools(protected))
    assert found.active.tolist() == bools(left).tolist()
    assert found.threshold == threshold


@pytest.mark.slow  # Triton starts a compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("numel", [1, 1000, 2304 * 768])
def test_a_gpu_decides_as_the_cpu_does(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    # Some 1,000 levels, so that most decisions are between ties.
    scores = torch.randn(2, numel, generator=generator).mul(100).round().to(dtype)
    active = torch.rand(numel, generator=generator) < 0.3
    count = int(active.sum()) // 2
    on_cpu = prune_and_grow(active, scores[0], scores[1], count)
    on_gpu = prune_and_grow(active.cuda(), scores[0].cuda(), scores[1].cuda(), count)
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.slow  # Triton starts a compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("active", "drop", "grow", "count", "topology"), TABLE)
def test_scores_to_topology_on_a_gpu(active: str, drop: list[float], grow: list[float], count: int, topology: str) -> None:
    new = prune_and_grow(bools(active).cuda(), torch.tensor(drop).cuda(), torch.tensor(grow).cuda(), count)
    assert new.tolist() == bools(topology).tolist()


SPECIAL = st.sampled_from([0.0, -0.0, DENORMAL, -DENORMAL, 2 * DENORMAL, 1.0, 1.0 + 2**-23, 2.0, -1.0, INF, -INF])
SCORE = SPECIAL | st.floats(width=32, allow_nan=False)
UNITS = st.lists(st.tuples(st.booleans(), SCORE, SCORE), min_size=1, max_size=60)
TIED = st.lists(st.tuples(st.booleans(), SPECIAL, st.sampled_from([0.0, -0.0, 1.0])), min_size=1, max_size=200)


@settings(max_examples=400)
@given(units=UNITS | TIED, data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_decision_is_that_of_sorting(
    units: list[tuple[bool, float, float]], data: st.DataObject, dtype: torch.dtype
) -> None:
    active, drop, grow = map(list, zip(*units, strict=True))
    count = data.draw(st.integers(0, sum(active)))
    given_active = torch.tensor(active)
    scores = torch.tensor(drop, dtype=dtype), torch.tensor(grow, dtype=dtype)
    new = prune_and_grow(given_active, *scores, count)
    assert new.tolist() == reference.prune_and_grow(active, drop, grow, count)
    assert int(new.sum()) == sum(active)
    protected = data.draw(st.lists(st.booleans(), min_size=len(units), max_size=len(units)))
    new = prune_and_grow(given_active, *scores, count, torch.tensor(protected))
    indices = {index for index, is_protected in enumerate(protected) if is_protected}
    assert new.tolist() == reference.prune_and_grow(active, drop, grow, count, indices)
    assert int(new.sum()) == sum(active)
    assert given_active.tolist() == active, "the argument is left as it was"


@pytest.mark.parametrize("numel", [1_000, 100_003])
def test_many_units_with_heavy_ties(numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    active = torch.rand(numel, generator=generator) < 0.3
    drop, grow = (torch.randint(0, 5, (numel,), generator=generator).float() for _ in range(2))
    for count in (0, 1, numel // 10, int(active.sum())):
        expected = reference.prune_and_grow(active.tolist(), drop.tolist(), grow.tolist(), count)
        assert prune_and_grow(active, drop, grow, count).tolist() == expected


@settings(max_examples=200)
@given(units=UNITS, data=st.data())
def test_exactly_count_are_dropped_and_grown(units: list[tuple[bool, float, float]], data: st.DataObject) -> None:
    """With what is inactive always scored above what is active, nothing just dropped can come back."""
    active = torch.tensor([unit[0] for unit in units])
    count = data.draw(st.integers(0, min(int(active.sum()), int((~active).sum()))))
    drop = torch.tensor([unit[1] for unit in units])
    new = prune_and_grow(active, drop, torch.where(active, 0.0, 1.0), count)
    assert int((active & ~new).sum()) == count
    assert int((new & ~active).sum()) == count


@settings(max_examples=200)
@given(units=UNITS, data=st.data())
def test_scores_that_are_not_read_may_be_nan(units: list[tuple[bool, float, float]], data: st.DataObject) -> None:
    active, drop, grow = (torch.tensor(column) for column in zip(*units, strict=True))
    count = data.draw(st.integers(0, int(active.sum())))
    new = prune_and_grow(active, drop, grow, count)
    survivors = prune_and_grow(active, drop, torch.where(active, -INF, INF), count) & active
    if int(survivors.sum()) == int(active.sum()) - count:  # there was room to grow elsewhere, so these are the survivors
        poisoned = prune_and_grow(active, drop.masked_fill(~active, NAN), grow.masked_fill(survivors, NAN), count)
        assert poisoned.tolist() == new.tolist()


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    ("drop", "grow", "message"),
    [
        ([NAN, 1, 1, 1], [0, 0, 0, 0], "1 of 2 drop scores are NaN"),
        ([NAN, NAN, 1, 1], [0, 0, 0, 0], "2 of 2 drop scores are NaN"),
        ([1, 2, 1, 1], [0, 0, 0, NAN], r"1 of \d grow scores are NaN"),
    ],
)
def test_nan_where_a_score_is_read_is_refused(drop: list[float], grow: list[float], message: str, count: int) -> None:
    with pytest.raises(TopologyError, match=message):
        prune_and_grow(bools("1100"), torch.tensor(drop), torch.tensor(grow), count)


def test_a_nan_growth_score_of_what_was_just_dropped_is_refused() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([NAN, 0.0, 0.0])
    with pytest.raises(TopologyError, match="1 of 2 grow scores are NaN"):
        prune_and_grow(bools("110"), *scores, 1)
    assert prune_and_grow(bools("110"), *scores, 0).tolist() == [True, True, False]


@pytest.mark.parametrize("numel", [3, 5, 40])
def test_scores_of_another_shape_are_refused(numel: int) -> None:
    right, wrong = torch.ones(4), torch.ones(numel)
    with pytest.raises(TopologyError, match=rf"drop scores must be of shape \(4,\), not \({numel},\)"):
        prune_and_grow(bools("1100"), wrong, right, 1)
    with pytest.raises(TopologyError, match=rf"grow scores must be of shape \(4,\), not \({numel},\)"):
        prune_and_grow(bools("1100"), right, wrong, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_scores_of_any_dtype_are_compared_exactly(dtype: torch.dtype) -> None:
    large = 2**24 if dtype == torch.int64 else 2
    drop, grow = torch.tensor([large + 1, large, 0, 0], dtype=dtype), torch.tensor([0, 0, large, large + 1], dtype=dtype)
    assert prune_and_grow(bools("1100"), drop, grow, 1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("count", [-1, 3])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(TopologyError, match=f"can't drop {count} of 2 active units"):
        prune_and_grow(bools("1100"), torch.ones(4), torch.ones(4), count)


def test_the_package_has_its_functions_by_name() -> None:
    active = torch.tensor([True, True, False])
    moved = sparsity.prune_and_grow(active, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]), 1)
    assert moved.tolist() == [True, False, True]
    assert sparsity.bits.pack(moved).tolist() == [0b101]
    shapes = {"a": (4, 4), "b": (2, 2)}
    assert sparsity.erk(shapes, 1.0) == sparsity.uniform(shapes, 1.0) == {"a": 1.0, "b": 1.0}
    assert sparsity.cosine(0.5, 5, 10, final=0.1) == pytest.approx(0.3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    sparsity.sparsify(model, 0.5)
    assert model[0].num_active == 8
