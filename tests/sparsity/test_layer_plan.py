"""How many weights of each layer are active, by a density, by patterns, or by a file."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from svite_scale.errors import SparsifyError
from svite_scale.sparsity.allocation.distributions import DISTRIBUTIONS, counts, erk
from svite_scale.sparsity.allocation.first_masks import SavedCounts
from svite_scale.sparsity.allocation.layer_patterns import densities_by_pattern, matching_layers
from svite_scale.sparsity.allocation.layer_plan import Allocation, LayerPlan, plan_density, plan_layers
from svite_scale.sparsity.block_grid import BlockGrid

NAMES = ["patch_embed.proj", *(f"blocks.{i}.{kind}" for i in (0, 1, 10) for kind in ("attn.qkv", "mlp.fc1")), "head"]
SHAPES = {name: torch.Size((8, 10)) for name in NAMES}


def grids(shapes: dict[str, torch.Size]) -> dict[str, BlockGrid]:
    return {name: BlockGrid(shape) for name, shape in shapes.items()}


def shapes_of(sizes: list[list[int]]) -> dict[str, torch.Size]:
    return {f"layer{i}": torch.Size(size) for i, size in enumerate(sizes)}


SIZES = st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=2, max_size=10).map(shapes_of)


def test_a_plan_knows_its_sizes() -> None:
    plan = LayerPlan("fc", torch.Size((4, 5)), 8)
    assert (plan.numel, plan.is_packed, plan.density) == (20, True, 0.4)
    assert not LayerPlan("fc", torch.Size((4, 5)), 20).is_packed


def test_the_first_pattern_that_matches_decides() -> None:
    densities = {"blocks.1.*": 0.1, "blocks.*.attn.qkv": 0.2, "blocks.*": 0.3, "*": 0.5}
    found = densities_by_pattern(NAMES, densities)
    assert list(found) == NAMES
    assert found == {
        "patch_embed.proj": 0.5,
        "blocks.0.attn.qkv": 0.2,
        "blocks.0.mlp.fc1": 0.3,
        "blocks.1.attn.qkv": 0.1,
        "blocks.1.mlp.fc1": 0.1,
        "blocks.10.attn.qkv": 0.2,
        "blocks.10.mlp.fc1": 0.3,
        "head": 0.5,
    }
    plan = plan_layers(grids(SHAPES), Allocation(densities=densities))
    assert {entry.name: entry.num_active for entry in plan} == {name: round(80 * found[name]) for name in NAMES}


def test_patterns_are_a_shells_and_know_upper_case() -> None:
    assert matching_layers(NAMES, ["blocks.[01].attn.*", "h??d"]) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv", "head"}
    with pytest.raises(SparsifyError, match=r"keep_dense = 'HEAD': matches no prunable layer; use names such as blocks\.1\."):
        matching_layers(NAMES, ["*", "HEAD"])


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        (
            {"*": 0.5, "head": 0.1},
            "{'head': 0.1}: decides no layer, since earlier patterns match all of its layers; put it",
        ),
        (
            {"block.*": 0.3, "*": 0.5},
            "{'block.*': 0.3}: decides no layer, since it matches none that is to be sparse; use",
        ),
        (
            {"blocks.*": 0.3, "head": 0.5},
            "{'blocks.*': 0.3, 'head': 0.5}: no pattern matches layer patch_embed.proj; "
            'add "*": DENSITY at the end for all others',
        ),
        ({"*": 0.001}, "{'*': 0.001}: leaves 1 active weights for 8 layers, of which each needs one; raise it, or list small"),
    ],
)
def test_densities_that_dont_fit_are_refused(densities: dict[str, float], message: str) -> None:
    with pytest.raises(SparsifyError, match=re.escape(f"densities = {message}")):
        plan_layers(grids(SHAPES), Allocation(densities=densities))


def test_layers_kept_dense_dont_count() -> None:
    plan = plan_layers(grids(SHAPES), Allocation(density=0.3, keep_dense=["head", "patch_embed*"]))
    assert [entry.name for entry in plan] == NAMES
    kept = [entry for entry in plan if entry.kept_dense]
    assert [entry.name for entry in kept] == ["patch_embed.proj", "head"]
    assert all(entry.num_active == 80 and not entry.is_packed for entry in kept)
    assert [entry.num_active for entry in plan if not entry.kept_dense] == [24] * 6
    assert plan_density(plan) == 0.3


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (
            Allocation(density=0.3, keep_dense=["head", "heads"]),
            "keep_dense = 'heads': matches no prunable layer; use names such",
        ),
        (
            Allocation(density=0.3, keep_dense=["h*", "*"]),
            "keep_dense = ['h*', '*']: keeps every layer dense; let it leave out",
        ),
        (
            Allocation(densities={"head": 0.3, "*": 0.5}, keep_dense=["head"]),
            "densities = {'head': 0.3}: decides no layer, since it matches none that is to be sparse",
        ),
        (Allocation(density=0.005), "density = 0.005: leaves 3 active weights for 8 layers, of which each needs one; raise it"),
    ],
)
def test_what_doesnt_fit_the_layers_is_refused(allocation: Allocation, message: str) -> None:
    with pytest.raises(SparsifyError, match=re.escape(message)):
        plan_layers(grids(SHAPES), allocation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.3, "densities": {"*": 0.3}}, r"density = 0\.3: isn't used where densities is given"),
        ({"density": 0.3, "masks": "a"}, r"density = 0\.3: isn't used where masks is given"),
        ({"densities": {"*": 0.3}, "masks": "a"}, "masks = 'a': also says where the weights are, as densities does"),
        ({"masks": "a", "distribution": "er"}, "distribution = 'er': isn't used where masks is given; leave it out"),
        ({"density": 0.3, "distribution": "ERK"}, "distribution = 'ERK': is not one of uniform, er, erk; use one of"),
        ({"densities": {"*": 0.0}}, r"densities\['\*'\] = 0\.0: is not above 0\.0; use a number above 0\.0 and up to 1\.0"),
        ({"densities": {"head": 0.5, "*": 1.1}}, r"densities\['\*'\] = 1\.1: is above 1\.0"),
        ({"densities": {"*": math.nan}}, r"densities\['\*'\] = nan: is not finite"),
        (
            {"density": 0.3, "distribution": "er", "power_scale": 2.0},
            r"power_scale = 2\.0: is only for a density that is spread by erk",
        ),
        ({"densities": {"*": 0.3}, "power_scale": 2.0}, r"power_scale = 2\.0: is only for a density that is spread by erk"),
    ],
)
def test_arguments_that_dont_go_together_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocation(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_each_distribution_is_the_one_named(distribution: str) -> None:
    shapes = shapes_of([[3, 40], [20, 20], [30, 6]])
    plan = plan_layers(grids(shapes), Allocation(density=0.2, distribution=distribution))
    assert [entry.num_active for entry in plan] == list(counts(shapes, DISTRIBUTIONS[distribution](shapes, 0.2)).values())


def test_the_exponent_reaches_erk() -> None:
    shapes = shapes_of([[3, 40], [20, 20], [30, 6]])
    plan = plan_layers(grids(shapes), Allocation(density=0.1, power_scale=0.5))
    expected = list(counts(shapes, erk(shapes, 0.1, power_scale=0.5)).values())
    assert [entry.num_active for entry in plan] == expected != list(counts(shapes, erk(shapes, 0.1)).values())


def test_a_layer_of_less_than_one_weight_is_raised() -> None:
    # Of 0.05 * (4 + 20 + 400) = 21.2 the first layer gets 0.2 and one whole weight, the second exactly one.
    shapes = shapes_of([[2, 2], [4, 5], [20, 20]])
    plan = plan_layers(grids(shapes), Allocation(density=0.05, distribution="uniform"))
    assert [(entry.num_active, entry.raised) for entry in plan] == [(1, True), (1, False), (19, False)]
    by_pattern = plan_layers(grids(shapes), Allocation(densities={"*": 0.05}))
    assert by_pattern == plan


@given(
    shapes=SIZES, density=st.floats(0.01, 1.0), kept=st.sets(st.integers(0, 9)), distribution=st.sampled_from([*DISTRIBUTIONS])
)
def test_a_plan_meets_the_density_of_the_layers_it_makes_sparse(
    distribution: str, shapes: dict[str, torch.Size], density: float, kept: set[int]
) -> None:
    keep_dense = [f"layer{i}" for i in sorted(kept) if f"layer{i}" in shapes]
    sparse = {name: shape for name, shape in shapes.items() if name not in keep_dense}
    densities = DISTRIBUTIONS[distribution](sparse, density) if sparse else {}
    budget = round(math.fsum(densities[name] * shape.numel() for name, shape in sparse.items()))
    assume(budget >= len(sparse) > 0)
    plan = plan_layers(grids(shapes), Allocation(density=density, distribution=distribution, keep_dense=keep_dense))
    assert {entry.name: entry.shape for entry in plan} == shapes
    assert sum(entry.num_active for entry in plan if entry.name in sparse) == budget
    assert plan_density(plan) == budget / sum(shape.numel() for shape in sparse.values())
    assert [entry.name for entry in plan if entry.kept_dense] == keep_dense
    for entry in plan:
        share = densities.get(entry.name, 1.0) * entry.numel
        assert entry.raised == (share < 1)
        assert entry.num_active == 1 if entry.raised else True
        assert entry.num_active == entry.numel if entry.kept_dense else True
    if not any(entry.raised for entry in plan):
        assert all(abs(entry.num_active - densities.get(entry.name, 1.0) * entry.numel) < 1 for entry in plan)


@given(shapes=SIZES, densities=st.lists(st.floats(0.1, 1.0), min_size=10, max_size=10))
def test_explicit_densities_are_met_layer_by_layer(shapes: dict[str, torch.Size], densities: list[float]) -> None:
    wanted = dict(zip(shapes, densities, strict=False))
    assume(all(wanted[name] * shape.numel() >= 1 for name, shape in shapes.items()))
    for entry in plan_layers(grids(shapes), Allocation(densities=wanted)):
        assert abs(entry.num_active - wanted[entry.name] * entry.numel) < 1


def test_a_checkpoints_counts_that_are_no_whole_blocks_are_refused() -> None:
    counts_of = SavedCounts({"fc": 24}).counts
    assert counts_of({"fc": BlockGrid(torch.Size((8, 12)), (4, 3)), "head": BlockGrid(torch.Size((8, 2)))}) == {
        "fc": 2,
        "head": 16,
    }
    message = r"block = \[8, 2\]: fc has 24 active weights in the checkpoint, which are no whole blocks; resume with the block"
    with pytest.raises(SparsifyError, match=message):
        counts_of({"fc": BlockGrid(torch.Size((8, 12)), (8, 2))})
