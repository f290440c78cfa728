"""An update's transient memory is bounded by the largest layer, not by the model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.packing import sparsify
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from tests.engines.engines import adamw, build_backend
from tests.ranks import run_on_ranks

WIDTH = 1536
DENSE_COPY = WIDTH * 2 * WIDTH * 4
"""Bytes of the largest layer's dense fp32 weight."""
UPDATES = 6


def transient(kind: str, density: float, method: str, block: tuple[int, int] = (1, 1)) -> int:
    """Runs on every rank: most bytes of tensors that one update held above what there was before it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, 300), nn.Linear(300, 5)
    )
    sparsify(model, density, distribution="uniform", block=block)
    backend = build_backend(kind, model, adamw, clip=None)
    schedule = UpdateSchedule(total_steps=2 * UPDATES, update_every=1)
    topology = TopologyEngine(model, backend.access, schedule, TopologyOptions(method=method), group=dist.group.WORLD)
    peaks = []
    for _ in range(UPDATES):
        backend.backward(backend.forward(torch.randn(1, WIDTH)).square().mean())
        backend.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            assert topology.step() is not None
        peaks.append(peak_bytes(profiler))
    # The least, for a collective's own thread frees late what it held, whenever it has to wait for a processor.
    return min(peaks)


def peak_bytes(profiler: profile) -> int:
    """Of all that torch's CPU allocator gave out, on any thread: inside operations and collectives too."""
    # The profiler's public tables add up what each operation kept, and so hide what it held meanwhile.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    assert len(changes) > 100, "allocations are seen"
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


CASES = [(kind, 2, "svite") for kind in ("ddp", "fsdp2", "zero2", "zero3")]
CASES += [("fsdp2", 4, "svite"), ("fsdp2", 2, "mixed"), ("zero3", 2, "mixed")]


@pytest.mark.parametrize(("kind", "world_size", "method"), CASES)
def test_no_rank_takes_more_than_three_dense_copies_of_its_largest_layer(kind: str, world_size: int, method: str) -> None:
    for taken in run_on_ranks(world_size, transient, kind, 0.3, method):
        assert DENSE_COPY < taken <= 3 * DENSE_COPY


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_no_rank_takes_more_than_three_dense_copies_at_other_densities(density: float) -> None:
    for taken in run_on_ranks(2, transient, "fsdp2", density, "svite"):
        assert DENSE_COPY < taken <= 3 * DENSE_COPY


def test_no_rank_takes_more_than_two_dense_copies_for_blocks() -> None:
    for taken in run_on_ranks(2, transient, "fsdp2", 0.3, "svite", (16, 4)):
        assert DENSE_COPY < taken <= 2 * DENSE_COPY
