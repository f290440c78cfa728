"""What the design promises of memory and traffic, measured on real engines (benchmarks/bytes.py prints the whole table)."""

from __future__ import annotations

import pytest

from benchmarks.bytes import BACKENDS, STATE, measure
from svite_scale.config.schema import SparsityConfig
from svite_scale.cost.flops import count_flops
from svite_scale.cost.memory import model_sizes
from svite_scale.cost.traffic import sent_per_step
from svite_scale.models.options import ModelConfig
from svite_scale.models.sparse import build_sparse
from tests.ranks import run_on_ranks

MODEL, DENSITY = "deit_tiny_patch16_224", 0.3
FLOOR = DENSITY + 1 / 128
"""Of the whole training state: the active weights, and one bit of mask for 16 bytes of dense state."""


@pytest.fixture(scope="module", params=["fsdp2", "zero2", "zero3"])
def held(request: pytest.FixtureRequest) -> tuple[str, dict[str, float], dict[str, float]]:
    """The backend, and the bytes of rank 0 of two: packed, dense."""
    backend: str = request.param
    packed, dense = (
        run_on_ranks(2, measure, backend, MODEL, SparsityConfig(density=density), "fp32")[0] for density in (DENSITY, 1.0)
    )
    return backend, packed, dense


def test_state_falls_with_density(held: tuple[str, dict[str, float], dict[str, float]]) -> None:
    backend, packed, dense = held
    state = sum(packed[kind] for kind in STATE) / sum(dense[kind] for kind in STATE)
    assert FLOOR < state <= 0.34
    limit = 0.32 if backend == "zero2" else 0.34
    assert all(DENSITY < packed[kind] / dense[kind] <= limit for kind in ("gradients", "moments"))


def test_traffic_falls_with_density_as_predicted(held: tuple[str, dict[str, float], dict[str, float]]) -> None:
    backend, packed, dense = held
    measured = packed["wire"] / dense["wire"]
    assert DENSITY < measured <= 0.36
    model, _ = build_sparse(ModelConfig(name=MODEL), SparsityConfig(density=DENSITY), seed=0)
    parallel = BACKENDS[backend]
    predicted = [
        sum(sent_per_step(parallel, "fp32", 2, size).values())
        for size in model_sizes(model, count_flops(model, image_size=224))
    ]
    assert measured == pytest.approx(predicted[0] / predicted[1], rel=0.03)
    if backend != "fsdp2":  # whose gradients gloo all-reduces
        assert [packed["wire"], dense["wire"]] == pytest.approx(predicted, rel=0.01)
