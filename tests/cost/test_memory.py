"""The plan's bytes per rank: closed forms, and what the engines' own tensors take."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from svite_scale.config.schema import SparsityConfig
from svite_scale.cost.memory import ModelSize, bytes_per_rank
from svite_scale.engines.backend import EngineOptions
from svite_scale.engines.build import build_backend
from svite_scale.engines.options import ParallelConfig
from svite_scale.models.dense import blocks
from svite_scale.models.options import ModelConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.train.ema import Ema
from tests.engines.engines import adamw
from tests.ranks import run_on_ranks
from tests.runs import chunks_of

SIZE = ModelSize(trainable=1000, mask_bytes=400, statistics_bytes=500)
FULL = {"values": 4000, "master values": 0, "mask": 400, "gradients": 4000, "moments": 8000}
QUARTER = {"values": 1000, "master values": 0, "mask": 100, "gradients": 1000, "moments": 2000, "statistics": 125}
PLANS = {
    "single": (ParallelConfig(backend="single"), "fp32", 1, {**FULL, "statistics": 500}),
    "ddp": (ParallelConfig(backend="ddp"), "fp32", 4, {**FULL, "statistics": 125}),
    "ddp in bf16 computes under autocast": (ParallelConfig(backend="ddp"), "bf16", 4, {**FULL, "statistics": 125}),
    "fsdp2": (ParallelConfig(backend="fsdp2"), "fp32", 4, QUARTER),
    "fsdp2 in bf16 gathers in bf16 and keeps fp32": (ParallelConfig(backend="fsdp2"), "bf16", 4, QUARTER),
    "zero 3": (ParallelConfig(backend="deepspeed", zero_stage=3), "fp32", 4, {**QUARTER, "master values": 1000}),
    "zero 3 in bf16": (
        ParallelConfig(backend="deepspeed", zero_stage=3),
        "bf16",
        4,
        {**QUARTER, "master values": 1000, "values": 500},
    ),
    "zero 1 in bf16 has the whole gradient twice": (
        ParallelConfig(backend="deepspeed", zero_stage=1),
        "bf16",
        4,
        {**QUARTER, "master values": 1000, "values": 2000, "mask": 400, "gradients": 2000 + 4000},
    ),
    "zero 2": (
        ParallelConfig(backend="deepspeed", zero_stage=2),
        "fp32",
        4,
        {**QUARTER, "master values": 1000, "values": 4000, "mask": 400},
    ),
    "odd shares are rounded up": (
        ParallelConfig(backend="fsdp2"),
        "fp32",
        3,
        {"values": 1336, "master values": 0, "mask": 134, "gradients": 1336, "moments": 2672, "statistics": 167},
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_predicted_bytes_are_those_of_arithmetic_on_each_engine(name: str) -> None:
    parallel, precision, world_size, expected = PLANS[name]
    assert bytes_per_rank(parallel, precision, world_size, SIZE) == expected


def test_ema_takes_as_many_bytes_as_the_optimizers_weights() -> None:
    for name, (parallel, precision, world_size, expected) in PLANS.items():
        planned = bytes_per_rank(parallel, precision, world_size, SIZE, ema=True)
        replicated = parallel.backend in ("single", "ddp")
        kept = expected["values" if replicated or parallel.backend == "fsdp2" else "master values"]
        assert planned == {**expected, "ema": kept}, name


MODEL = ModelConfig(
    name="vit_tiny_patch16_224", num_classes=10, image_size=8, in_channels=1, patch_size=4, embed_dim=24, depth=2, num_heads=2
)


def held(engine: str, block: tuple[int, int]) -> dict[str, int]:
    """Bytes of this rank's tensors by kind, just before the second optimizer step."""
    model, _ = build_sparse(MODEL, SparsityConfig(density=0.6, block=block), seed=0)
    options = EngineOptions(device=torch.device("cpu"), wrap_units=blocks(model), micro_batch_size=4)
    parallel = ParallelConfig(backend=engine)  # type: ignore[arg-type]
    backend = build_backend(parallel, model, adamw, options)
    topology = TopologyEngine(model, backend.access, UpdateSchedule(total_steps=100, update_every=10), group=dist.group.WORLD)
    for step in range(2):
        backend.backward(backend.forward(torch.randn(4, 1, 8, 8)).square().mean())
        if step == 0:
            backend.step()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    state = [value for entry in backend.optimizer.state.values() for value in entry.values() if value.dim() > 0]
    return {
        "values": sum(map(local_bytes, trainable)),
        "master values": 0,
        "mask": sum(map(local_bytes, frozen)),
        "gradients": sum(local_bytes(parameter.grad) for parameter in trainable if parameter.grad is not None),
        "moments": sum(map(local_bytes, state)),
        "statistics": sum(map(local_bytes, chunks_of(topology).values())),
        "ema": sum(map(local_bytes, Ema(model, topology, 0.9).parts.values())),
    }


def local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize(
    ("engine", "world_size", "block"),
    [
        ("single", 1, (1, 1)),
        ("ddp", 2, (1, 1)),
        ("ddp", 2, (2, 1)),
        ("fsdp2", 1, (1, 1)),
        ("fsdp2", 2, (1, 1)),
        ("fsdp2", 3, (1, 1)),
    ],
)
def test_engines_hold_the_predicted_bytes(engine: str, world_size: int, block: tuple[int, int]) -> None:
    """FSDP2 cuts each parameter by itself, and the ends differ: only the ranks' sum is the plan's."""
    model, plan = build_sparse(MODEL, SparsityConfig(density=0.6, block=block), seed=0)
    weights_per_bit = math.prod(block)
    mask_bytes = sum(-(-layer.numel // weights_per_bit // 8) for layer in plan if layer.is_packed)
    size = ModelSize(
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        mask_bytes=mask_bytes,
        statistics_bytes=mask_bytes + sum(-(-layer.num_active // weights_per_bit // 8) for layer in plan if layer.is_packed),
    )
    plan = bytes_per_rank(ParallelConfig(backend=engine), "fp32", world_size, size, ema=True)  # type: ignore[arg-type]
    ranks = run_on_ranks(world_size, held, engine, block)
    for kind, planned in plan.items():
        found = [rank[kind] for rank in ranks]
        # Rounding up to whole elements, fp32 moments being two.
        assert 0 <= world_size * planned - sum(found) <= 8 * world_size, kind
        assert max(found) <= 1.2 * planned, kind
