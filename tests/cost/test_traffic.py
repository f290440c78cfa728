"""The predicted bytes that a rank sends in a step: closed forms, and what the kernel counted on real engines."""

from __future__ import annotations

import pytest

from svite_scale.cost.memory import ModelSize
from svite_scale.cost.traffic import sent_per_step
from svite_scale.engines.options import ParallelConfig

SIZE = ModelSize(trainable=1000, mask_bytes=400, statistics_bytes=500)
SINGLE, DDP, FSDP2 = (ParallelConfig(backend=name) for name in ("single", "ddp", "fsdp2"))  # type: ignore[arg-type]
ZERO1, ZERO2, ZERO3 = (ParallelConfig(backend="deepspeed", zero_stage=stage) for stage in (1, 2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parallel", "precision", "accumulation_steps", "expected"),
    [
        (DDP, "fp32", 1, {"gradients": 6000, "weights": 0, "mask": 0}),
        (DDP, "bf16", 2, {"gradients": 12000, "weights": 0, "mask": 0}),
        (FSDP2, "fp32", 1, {"gradients": 3000, "weights": 6000, "mask": 600}),
        (FSDP2, "bf16", 3, {"gradients": 9000, "weights": 9000, "mask": 1800}),
        (ZERO1, "fp32", 2, {"gradients": 6000, "weights": 3000, "mask": 0}),
        (ZERO2, "fp32", 2, {"gradients": 12000, "weights": 3000, "mask": 0}),
        (ZERO2, "bf16", 1, {"gradients": 6000, "weights": 1500, "mask": 0}),
        (ZERO3, "bf16", 1, {"gradients": 3000, "weights": 3000, "mask": 300}),
    ],
)
def test_sent_bytes_on_four_ranks_are_those_of_rings(
    parallel: ParallelConfig, precision: str, accumulation_steps: int, expected: dict[str, int]
) -> None:
    assert sent_per_step(parallel, precision, 4, SIZE, accumulation_steps=accumulation_steps) == expected


@pytest.mark.parametrize("parallel", [SINGLE, DDP, FSDP2, ZERO1, ZERO3])
def test_one_rank_sends_nothing(parallel: ParallelConfig) -> None:
    assert sum(sent_per_step(parallel, "fp32", 1, SIZE).values()) == 0
