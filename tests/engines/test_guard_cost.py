"""What it costs to look whether a gradient is finite before the optimizer takes it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.engines.engines import SHARED, adamw, build_backend, small_vit
from tests.ranks import run_on_ranks


def collectives_of_a_step(kind: str, clip: float | None, skip_nonfinite: bool) -> Counter[str]:
    """What gloo was asked for in the optimizer's second step. Runs on every rank."""
    backend = build_backend(kind, small_vit(), adamw, micro_batch_size=7, clip=clip, skip_nonfinite=skip_nonfinite)
    for step in range(2):
        images = torch.randn(7, 1, 14, 14, generator=torch.Generator().manual_seed(step))
        backend.backward(backend.forward(images).square().mean())
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            assert backend.step().applied
    return Counter(event.name for event in seen.events() if event.name.startswith("gloo:"))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", SHARED)
def test_the_guard_costs_one_all_reduce_under_fsdp2_without_clipping_and_nothing_elsewhere(
    kind: str, clip: float | None
) -> None:
    looking, blind = (run_on_ranks(2, collectives_of_a_step, kind, clip, look)[0] for look in (True, False))
    added = Counter({"gloo:all_reduce": 1}) if kind == "fsdp2" and clip is None else Counter()
    assert looking - blind == added, (looking, blind)
    assert not blind - looking
    if kind != "ddp":
        assert looking, "collectives are seen"
