"""What the design promises of memory and traffic, measured on real engines (benchmarks/bytes.py prints the whole table)."""

from __future__ import annotations

import pytest

from benchmarks.bytes import STATE, measure
from tests.ranks import run_on_ranks

MODEL, DENSITY = "deit_tiny_patch16_224", 0.3
FLOOR = DENSITY + 1 / 128
"""Of the whole training state: the active weights, and one bit of mask for 16 bytes of dense state."""


@pytest.fixture(scope="module", params=["fsdp2", "zero2", "zero3"])
def held(request: pytest.FixtureRequest) -> tuple[str, dict[str, float], dict[str, float]]:
    """The backend, and the bytes of rank 0 of two: packed, dense."""
    backend: str = request.param
    packed, dense = (run_on_ranks(2, measure, backend, MODEL, density, "fp32")[0] for density in (DENSITY, 1.0))
    return backend, packed, dense


def test_state_falls_with_density(held: tuple[str, dict[str, float], dict[str, float]]) -> None:
    backend, packed, dense = held
    state = sum(packed[kind] for kind in STATE) / sum(dense[kind] for kind in STATE)
    assert FLOOR < state <= 0.34
    limit = 0.32 if backend == "zero2" else 0.34
    assert all(DENSITY < packed[kind] / dense[kind] <= limit for kind in ("gradients", "moments"))


def test_traffic_falls_with_density(held: tuple[str, dict[str, float], dict[str, float]]) -> None:
    _, packed, dense = held
    assert DENSITY < packed["wire"] / dense["wire"] <= 0.36
