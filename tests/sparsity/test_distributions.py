"""How a global density is spread over layers."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from svite_scale.sparsity.allocation.distributions import DISTRIBUTIONS, counts, er, erk, uniform
from tests import reference
from tests.sparsity.deit import UNPRUNED, deit_shapes

SHAPE = st.lists(st.integers(1, 40), min_size=2, max_size=2) | st.lists(st.integers(1, 9), min_size=4, max_size=4)
SHAPES = st.lists(SHAPE, min_size=1, max_size=12).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})
DENSITY = st.floats(0.001, 1.0)


@pytest.mark.parametrize("density", [0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_erk_on_deit_has_its_closed_form(size: str, density: float) -> None:
    shapes = deit_shapes(size)
    densities = erk(shapes, density)
    assert densities == pytest.approx(reference.erk_densities(shapes, density), abs=1e-9)
    assert list(densities) == list(shapes)
    for power in (0.5, 2.0):
        found = erk(shapes, density, power_scale=power)
        assert found == pytest.approx(reference.erk_densities(shapes, density, power), abs=1e-9)
        assert found != densities
    total = sum(math.prod(shape) for shape in shapes.values())
    assert sum(counts(shapes, densities).values()) == round(density * total)


@pytest.mark.parametrize("density", [0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_er_on_deit_has_its_closed_form(size: str, density: float) -> None:
    shapes = deit_shapes(size)
    densities = er(shapes, density)
    assert densities == pytest.approx(reference.er_densities(shapes, density), abs=1e-9)
    assert list(densities) == list(shapes)


def test_deit_tiny_at_30_percent_sparsity_has_4_02_million_parameters() -> None:
    """The paper's table gives 4.02 M."""
    shapes = deit_shapes("tiny")
    assert sum(math.prod(shape) for shape in shapes.values()) + UNPRUNED["tiny"] == 5_717_416
    active = sum(counts(shapes, erk(shapes, 0.7)).values())
    assert active + UNPRUNED["tiny"] == 4_023_054


def test_erk_has_its_values_by_hand() -> None:
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


def test_er_counts_no_kernels() -> None:
    """(out + in) over their product."""
    densities = er({"conv": (4, 3, 2, 2), "fc": (30, 40)}, 0.05)
    assert densities["conv"] / densities["fc"] == pytest.approx((7 / 12) / (70 / 1200))


def test_the_exponent_is_that_of_the_ratio() -> None:
    shapes = {"conv": (4, 3, 2, 2), "fc": (30, 40)}
    for power in (0.5, 2.0):
        densities = erk(shapes, 0.01, power_scale=power)
        assert densities["conv"] / densities["fc"] == pytest.approx(((11 / 48) / (70 / 1200)) ** power)
    # Exponents far from 1 end at the same density everywhere, and at whole layers one after another.
    assert erk(shapes, 0.1, power_scale=1e-9) == pytest.approx({"conv": 0.1, "fc": 0.1})
    assert erk(shapes, 0.1, power_scale=1e3) == pytest.approx({"conv": 1.0, "fc": (124.8 - 48) / 1200})


@given(shapes=SHAPES, density=DENSITY, power=st.sampled_from([0.5, 1.0, 2.0]))
def test_erk_and_er_meet_the_density(shapes: dict[str, list[int]], density: float, power: float) -> None:
    total = sum(math.prod(shape) for shape in shapes.values())
    for densities, expected in (
        (erk(shapes, density, power_scale=power), reference.erk_densities(shapes, density, power)),
        (er(shapes, density), reference.er_densities(shapes, density)),
    ):
        assert all(0 < value <= 1 for value in densities.values())
        assert sum(densities[name] * math.prod(shape) for name, shape in shapes.items()) == pytest.approx(density * total)
        assert densities == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(shapes=SHAPES, density=DENSITY, more=DENSITY)
def test_no_layer_loses_density_where_the_whole_gains_some(
    distribution: str, shapes: dict[str, list[int]], density: float, more: float
) -> None:
    low, high = (DISTRIBUTIONS[distribution](shapes, value) for value in sorted((density, more)))
    assert all(high[name] >= low[name] * (1 - 1e-12) for name in shapes)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(shapes=SHAPES)
def test_distributions_at_density_1_are_dense(distribution: str, shapes: dict[str, list[int]]) -> None:
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    assert counts(shapes, DISTRIBUTIONS[distribution](shapes, 1.0)) == numel


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=300)
@given(shapes=SHAPES, density=DENSITY)
def test_counts_hit_the_budget_exactly(distribution: str, shapes: dict[str, list[int]], density: float) -> None:
    densities = DISTRIBUTIONS[distribution](shapes, density)
    share = {name: densities[name] * math.prod(shape) for name, shape in shapes.items()}
    budget = round(math.fsum(share.values()))
    assume(budget >= len(shapes))
    result = counts(shapes, densities)
    assert sum(result.values()) == budget
    assert list(result) == list(shapes)
    assert all(isinstance(count, int) and 1 <= count <= math.prod(shapes[name]) for name, count in result.items())
    assert all(result[name] == 1 for name in shapes if share[name] < 1)
    # What raised layers take beyond the floors' leavings comes from the largest alone.
    excess = sum(max(1, math.floor(value)) for value in share.values()) - budget
    if excess <= 0:
        assert all(abs(result[name] - share[name]) < 1 for name in shapes if share[name] >= 1), "within one weight"
        return
    losers = {name for name in shapes if result[name] < math.floor(share[name])}
    assert sum(math.floor(share[name]) - result[name] for name in losers) == excess
    sparse = {name for name in shapes if densities[name] < 1}
    paid_by_dense = losers - sparse
    assert not paid_by_dense or all(result[name] == 1 for name in sparse), "dense layers come last"
    for payers in (losers & sparse, paid_by_dense):
        others = sparse if payers <= sparse else set(shapes)
        assert all(result[other] <= result[name] + 1 for name in payers for other in others), "no layer is left larger"


@given(shapes=SHAPES, density=DENSITY, more=DENSITY)
def test_a_greater_density_has_no_fewer_weights(shapes: dict[str, list[int]], density: float, more: float) -> None:
    """And no layer loses more than the weight that rounding moves, where no layer is raised."""
    low, high = sorted((density, more))
    fewer, greater = erk(shapes, low), erk(shapes, high)
    assume(all(fewer[name] * math.prod(shape) >= 1 for name, shape in shapes.items()))
    before, after = counts(shapes, fewer), counts(shapes, greater)
    assert sum(before.values()) <= sum(after.values())
    assert all(before[name] <= after[name] + 1 for name in shapes)


def test_counts_have_their_values_by_hand() -> None:
    # Shares 2.5, 2.5, 2.7, 0.1 of a budget of 7.8: floors 2, 2, 2 and the least 1 leave one, for the largest remainder.
    shapes = {"a": (1, 5), "b": (1, 5), "c": (1, 9), "d": (1, 10)}
    assert counts(shapes, {"a": 0.5, "b": 0.5, "c": 0.3, "d": 0.01}) == {"a": 2, "b": 2, "c": 3, "d": 1}
    # Equal remainders go to the earlier layer.
    assert counts(shapes, {"a": 0.5, "b": 0.5, "c": 1.0, "d": 1.0}) == {"a": 3, "b": 2, "c": 9, "d": 10}


def test_counts_take_extra_weights_from_the_largest_layers() -> None:
    # Shares 0.2, 0.2, 0.2, 0.2, 3, 4 of a budget of 8 (7.8): 4 raised and 7 are three too many.
    shapes = {"a": (1, 2), "b": (1, 2), "c": (1, 2), "d": (1, 2), "e": (1, 30), "f": (1, 40)}
    densities = {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.1, "f": 0.1}
    assert counts(shapes, densities) == {"a": 1, "b": 1, "c": 1, "d": 1, "e": 2, "f": 2}


def test_counts_take_extra_weights_from_dense_layers_last() -> None:
    shapes = {"a": (1, 20), "b": (1, 9), "c": (1, 10)}
    # Shares 20, 2.7 and 0.1 of a budget of 23 (22.8): the raised c's comes out of the remainder.
    assert counts(shapes, {"a": 1.0, "b": 0.3, "c": 0.01}) == {"a": 20, "b": 2, "c": 1}
    # Shares 20, 4, 0.1 of a budget of 24: the one that is too many is b's.
    assert counts(shapes, {"a": 1.0, "b": 4 / 9, "c": 0.01}) == {"a": 20, "b": 3, "c": 1}
    # Shares 20, 0.1, 0.1 of a budget of 20: both have one only.
    assert counts(shapes, {"a": 1.0, "b": 0.1 / 9, "c": 0.01}) == {"a": 18, "b": 1, "c": 1}


def test_a_budget_below_one_weight_per_layer_is_refused() -> None:
    shapes = {"a": (1, 10), "b": (1, 10), "c": (1, 10)}
    assert counts(shapes, dict.fromkeys(shapes, 0.1)) == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(ValueError, match="leaves 2 active weights for 3 layers, of which each needs one"):
        counts(shapes, dict.fromkeys(shapes, 0.08))


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_an_exponent_out_of_range_is_refused(power: float) -> None:
    with pytest.raises(ValueError, match=r"power_scale .* must be above 0"):
        erk({"a": (2, 2)}, 0.5, power_scale=power)


def test_uniform_is_the_same_everywhere() -> None:
    assert uniform({"a": (3, 4), "b": (5, 6)}, 0.25) == {"a": 0.25, "b": 0.25}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan")])
def test_a_density_out_of_range_is_refused(distribution: str, density: float) -> None:
    with pytest.raises(ValueError, match=r"density .* must be in \(0, 1\]"):
        DISTRIBUTIONS[distribution]({"a": (2, 2)}, density)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions_refuse_an_empty_model(distribution: str) -> None:
    with pytest.raises(ValueError, match="no layer"):
        DISTRIBUTIONS[distribution]({}, 0.5)
