"""How a global density is spread over layers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svite_scale.sparsity.distributions import DISTRIBUTIONS, counts, erk, uniform
from tests import reference
from tests.sparsity.deit import UNPRUNED, deit_shapes

SHAPE = st.lists(st.integers(1, 40), min_size=2, max_size=2) | st.lists(st.integers(1, 9), min_size=4, max_size=4)
SHAPES = st.lists(SHAPE, min_size=1, max_size=12).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})
DENSITY = st.floats(0.001, 1.0)


@pytest.mark.parametrize("density", [0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_erk_on_deit(size: str, density: float) -> None:
    shapes = deit_shapes(size)
    densities = erk(shapes, density)
    assert densities == pytest.approx(reference.erk_densities(shapes, density), rel=1e-9)
    assert list(densities) == list(shapes)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert sum(counts(shapes, densities).values()) == round(density * total)


def test_deit_tiny_at_30_percent_sparsity_has_4_02_million_parameters() -> None:
    """The paper's number (DESIGN section 9)."""
    shapes = deit_shapes("tiny")
    assert sum(math.prod(shape) for shape in shapes.values()) + UNPRUNED["tiny"] == 5_717_416
    active = sum(counts(shapes, erk(shapes, 0.7)).values())
    assert active + UNPRUNED["tiny"] == 4_023_054


def test_erk_by_hand() -> None:
    # Sums over products: 3/2, 2/4 of 4, 10/25 of 25. At density 0.4 the budget is 12.4 of 31, and the scale
    # 12.4 / (3 + 4 + 10) = 0.7294 puts the first above 1; then (12.4 - 2) / 14 = 0.742857.
    densities = erk({"a": (1, 2), "b": (2, 2), "c": (5, 5)}, 0.4)
    scale = 10.4 / 14
    assert densities == pytest.approx({"a": 1.0, "b": scale, "c": scale * 0.4})


def test_erk_holds_layers_at_1_in_turn() -> None:
    """Holding the first layer at 1 pushes the next above 1."""
    # The budget is 26.5; 26.5 / 27 leaves b below 1, (26.5 - 2) / 24 doesn't.
    assert erk({"a": (1, 2), "b": (2, 2), "c": (10, 10)}, 0.25) == pytest.approx({"a": 1.0, "b": 1.0, "c": 0.205})


def test_erk_counts_kernels() -> None:
    """(out + in + height + width) over their product."""
    densities = erk({"conv": (4, 3, 2, 2), "fc": (30, 40)}, 0.1)
    assert densities["conv"] / densities["fc"] == pytest.approx((11 / 48) / (70 / 1200))


@given(shapes=SHAPES, density=DENSITY)
def test_erk_meets_the_density(shapes: dict[str, list[int]], density: float) -> None:
    densities = erk(shapes, density)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert all(0 < value <= 1 for value in densities.values())
    assert sum(densities[name] * math.prod(shape) for name, shape in shapes.items()) == pytest.approx(density * total)
    assert densities == pytest.approx(reference.erk_densities(shapes, density), rel=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(shapes=SHAPES)
def test_density_1_is_dense(distribution: str, shapes: dict[str, list[int]]) -> None:
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    assert counts(shapes, DISTRIBUTIONS[distribution](shapes, 1.0)) == numel


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=300)
@given(shapes=SHAPES, density=DENSITY)
def test_counts_hit_the_budget_exactly(distribution: str, shapes: dict[str, list[int]], density: float) -> None:
    densities = DISTRIBUTIONS[distribution](shapes, density)
    result = counts(shapes, densities)
    share = {name: densities[name] * math.prod(shape) for name, shape in shapes.items()}
    for name, count in result.items():
        assert isinstance(count, int)
        assert 1 <= count <= math.prod(shapes[name])
        assert abs(count - share[name]) < 1, "within one weight of its share"
    budget = round(sum(share.values()))
    kept_alive = sum(1 for value in share.values() if value < 1)
    assert budget <= sum(result.values()) <= budget + kept_alive
    if not kept_alive:
        assert sum(result.values()) == budget


def test_counts_by_hand() -> None:
    # Shares 2.5, 2.5, 2.7, 0.1 of a budget of 7.8: floors 2, 2, 2 and the least 1 leave one, for the largest remainder.
    shapes = {"a": (1, 5), "b": (1, 5), "c": (1, 9), "d": (1, 10)}
    assert counts(shapes, {"a": 0.5, "b": 0.5, "c": 0.3, "d": 0.01}) == {"a": 2, "b": 2, "c": 3, "d": 1}
    # Equal remainders go to the earlier layer.
    assert counts(shapes, {"a": 0.5, "b": 0.5, "c": 1.0, "d": 1.0}) == {"a": 3, "b": 2, "c": 9, "d": 10}


def test_uniform_is_the_same_everywhere() -> None:
    assert uniform({"a": (3, 4), "b": (5, 6)}, 0.25) == {"a": 0.25, "b": 0.25}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan")])
def test_a_density_out_of_range_is_refused(distribution: str, density: float) -> None:
    with pytest.raises(ValueError, match=r"density .* must be in \(0, 1\]"):
        DISTRIBUTIONS[distribution]({"a": (2, 2)}, density)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_layer_is_refused(distribution: str) -> None:
    with pytest.raises(ValueError, match="no layer"):
        DISTRIBUTIONS[distribution]({}, 0.5)
