"""Bytes of training state on each rank, by engine, computed from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from svite_scale.engines.options import ParallelConfig

FP32 = 4
MOMENTS = 2 * FP32
"""Adam's family keeps two fp32 numbers per weight."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that the bytes depend on.

    Attributes:
        trainable: number of trainable elements: active weights, biases, norms, embeddings.
        mask_bytes: of all packed masks together.
        statistics_bytes: of the topology's statistics together: a bit per weight, and one per active weight.
    """

    trainable: int
    mask_bytes: int
    statistics_bytes: int


def bytes_per_rank(
    parallel: ParallelConfig, precision: str, world_size: int, size: ModelSize, *, ema: bool = False
) -> dict[str, int]:
    """Returns the persistent bytes on one rank, by kind, without padding, buckets and activations.

    Args:
        parallel: the engine.
        precision: ``fp32`` or ``bf16``. In bf16 ZeRO keeps bf16 weights beside the fp32 master values.
        world_size: number of ranks that share the state.
        size: of the model.
        ema: whether an average of the weights is kept.

    Returns:
        ``values`` (used by forward), ``master values`` (the optimizer's own copy, if it has one), ``mask``, ``gradients``
        (all of them, as just before the optimizer's step), ``moments``, ``statistics``; and ``ema``, if there is one.
    """
    sharded = parallel.backend not in ("single", "ddp")
    # A rank keeps the average of the values that its optimizer steps.
    average = {"ema": -(-size.trainable // (world_size if sharded else 1)) * FP32} if ema else {}
    return _engine_bytes(parallel, precision, world_size, size) | average


def _engine_bytes(parallel: ParallelConfig, precision: str, world_size: int, size: ModelSize) -> dict[str, int]:

    def shard(count: int) -> int:
        return -(-count // world_size)

    weights, stage = size.trainable, parallel.zero_stage
    statistics = shard(size.statistics_bytes)
    if parallel.backend in ("single", "ddp"):
        kept = {"values": weights * FP32, "master values": 0, "mask": size.mask_bytes, "gradients": weights * FP32}
        return {**kept, "moments": weights * MOMENTS, "statistics": statistics}
    sharded = {"master values": 0, "moments": shard(weights) * MOMENTS, "statistics": statistics}
    if parallel.backend == "fsdp2":
        return {**sharded, "values": shard(weights) * FP32, "mask": shard(size.mask_bytes), "gradients": shard(weights) * FP32}
    compute = FP32 if precision == "fp32" else 2
    held = shard if stage == 3 else int
    # In bf16, stage 1 goes through an optimizer of DeepSpeed's that accumulates the whole gradient in fp32 on every rank.
    gradients = weights * (2 + FP32) if stage == 1 and precision == "bf16" else shard(weights) * FP32
    return {
        "values": held(weights) * compute,
        "master values": shard(weights) * FP32,
        "mask": held(size.mask_bytes),
        "gradients": gradients,
        "moments": shard(weights) * MOMENTS,
        "statistics": statistics,
    }
