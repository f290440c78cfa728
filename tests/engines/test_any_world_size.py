"""Whatever the shape, the density, the fraction, the ties and the number of ranks: the decision is that of the reference."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svite_scale.engines.torch_access import TorchAccess
from svite_scale.sparsity import sharding
from svite_scale.sparsity.layers.blocks import BlockLinear
from svite_scale.sparsity.layers.packed import PackedLinear
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.packing import random_mask
from svite_scale.sparsity.sharding import chunk_numel, padded, rank_chunk, rank_numel
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from tests import reference
from tests.ranks import run_on_ranks


@dataclass(frozen=True)
class Case:
    """One layer and one update of it.

    Attributes:
        rows: of units, which are blocks of weights.
        columns: the same.
        levels: scores are whole numbers from minus this to this: the fewer, the more ties.
        window: steps that are averaged, of ``micro_batches`` each.
    """

    rows: int
    columns: int
    block: tuple[int, int]
    num_active: int
    fraction: float
    levels: int
    window: int
    micro_batches: int
    by_magnitude: bool
    seed: int

    @property
    def num_units(self) -> int:
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        height, width = self.block
        return self.rows * height, self.columns * width

    @property
    def units(self) -> list[list[int]]:
        """The flat positions of each unit in the weight."""
        return reference.unit_positions(self.shape, self.block)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    return Case(
        rows=rows,
        columns=columns,
        block=draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)])),
        num_active=draw(st.integers(1, rows * columns)),
        fraction=draw(st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0.0, 1.0)),
        levels=draw(st.sampled_from([0, 1, 3, 100])),
        window=draw(st.integers(1, 3)),
        micro_batches=draw(st.integers(1, 2)),
        by_magnitude=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def drawn(case: Case, count: int, *place: int) -> list[int]:
    """Whole numbers, so that every sum is exact in any order."""
    generator = random.Random(f"{case.seed}/{place}")
    return [generator.randint(-case.levels, case.levels) for _ in range(count)]


def updated(case: Case) -> tuple[list[bool], list[float], float | None]:
    """Runs on every rank: the mask and the values after one update, and the threshold of growth."""
    dense = nn.Linear(*reversed(case.shape), bias=False)
    layer = (PackedLinear if case.block == (1, 1) else BlockLinear)(dense, case.num_active, "layer", case.block)
    numel = dense.weight.numel()
    layer.set_weight(torch.tensor(drawn(case, numel, -1)).float().view_as(dense.weight), mask_of(case))
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    schedule = UpdateSchedule(
        total_steps=3,
        update_every=3,
        stop_fraction=1.0,
        drop_fraction=case.fraction,
        drop_schedule="constant",
    )
    options = TopologyOptions(grow_window=case.window, grow_by="magnitude" if case.by_magnitude else "gradient")
    topology = TopologyEngine(layer, TorchAccess(layer, optimizer), schedule, options, group=dist.group.WORLD)
    for step in range(3):
        if layer.gradient_hook is not None:
            for micro_batch in range(case.micro_batches):
                layer.gradient_hook(gradient_of(case, drawn(case, case.num_units, dist.get_rank(), step, micro_batch)))
        update = topology.step()
    assert update is not None
    mask = np.unpackbits(layer.mask.numpy(), bitorder="little")[: case.num_units].astype(bool).tolist()
    return mask, layer.values.detach().flatten().tolist(), update.layers["layer"].grow_threshold


def gradient_of(case: Case, of_units: list[int]) -> torch.Tensor:
    """A gradient that is 0 but for one weight in each unit, so that a unit's norm is that weight's magnitude, exactly."""
    unit_numel = math.prod(case.block)
    units = torch.arange(case.num_units)
    gradient = torch.zeros(case.num_units, unit_numel)
    gradient[units, units % unit_numel] = torch.tensor(of_units).float()
    return gradient


def mask_of(case: Case) -> torch.Tensor:
    return random_mask(case.num_units, case.num_active, case.seed, "layer")


def expected(case: Case, world_size: int) -> tuple[list[bool], list[float], list[int]]:
    """The reference's mask and values, and its growth scores times steps and ranks, as whole numbers."""
    units, before = case.units, mask_of(case).tolist()
    weights = drawn(case, math.prod(case.shape), -1)
    scores = [0] * len(units)
    for step in range(3 - case.window, 3):
        places = [(rank, step, micro) for rank in range(world_size) for micro in range(case.micro_batches)]
        totals = [sum(column) for column in zip(*(drawn(case, len(units), *place) for place in places), strict=True)]
        scores = [score + (abs(total) if case.by_magnitude else total) for score, total in zip(scores, totals, strict=True)]
    scores = [abs(score) for score in scores]
    count = min(math.ceil(case.fraction * case.num_active), case.num_active)
    squares = [sum(weights[position] ** 2 for position in unit) for unit in units]
    after = reference.prune_and_grow(before, squares, scores, count)
    values = [float(weights[at]) if before[i] else 0.0 for i, unit in enumerate(units) if after[i] for at in unit]
    return after, values, scores


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@settings(max_examples=30)
@given(case=cases())
def test_the_decision_is_that_of_the_reference(world_size: int, case: Case) -> None:
    mask, values, scores = expected(case, world_size)
    for found_mask, found_values, threshold in run_on_ranks(world_size, updated, case):
        assert found_mask == mask
        assert found_values == values
        if threshold is not None:
            assert np.float32(threshold) in {np.float32(score) / np.float32(world_size * case.window) for score in scores}


def gathered(numel: int, in_one_go: int) -> list[int]:
    """Runs on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "GATHERED_NUMEL", in_one_go)
        chunk = rank_chunk(torch.arange(numel), dist.get_rank(), dist.get_world_size())
        return sharding.gather_chunks(chunk, numel, dist.group.WORLD).tolist()


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize(("numel", "in_one_go"), [(1, 8), (23, 8), (24, 1), (41, 7), (40, 100)])
def test_gather_equal_in_pieces_returns_the_whole(world_size: int, numel: int, in_one_go: int) -> None:
    for whole in run_on_ranks(world_size, gathered, numel, in_one_go):
        assert whole == list(range(numel))


@given(numel=st.integers(0, 100), world_size=st.integers(1, 20))
def test_chunks_are_equal_but_the_last_and_make_up_the_whole(numel: int, world_size: int) -> None:
    whole = torch.arange(numel)
    chunks = [rank_chunk(whole, rank, world_size) for rank in range(world_size)]
    assert torch.cat(chunks).tolist() == whole.tolist()
    assert [chunk.numel() for chunk in chunks] == [rank_numel(numel, rank, world_size) for rank in range(world_size)]
    size = chunk_numel(numel, world_size)
    joined = torch.cat([padded(chunk, size) for chunk in chunks])
    assert joined[:numel].tolist() == whole.tolist()
    assert joined.numel() == size * world_size
