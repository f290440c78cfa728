"""Bytes of training state on each rank, by engine, computed from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from svite_scale.cost.flops import ModelCost
from svite_scale.engines.options import ParallelConfig
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers

FP32 = 4
MOMENTS = 2 * FP32
"""Adam's family keeps two fp32 numbers per weight."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that the bytes depend on.

    Attributes:
        trainable: number of trainable elements: active weights, biases, norms, embeddings.
        mask_bytes: of all packed masks together.
        statistics_bytes: of the topology's statistics together: a bit per unit, and one per active unit.
    """

    trainable: int
    mask_bytes: int
    statistics_bytes: int


def model_sizes(model: nn.Module, cost: ModelCost) -> tuple[ModelSize, ModelSize]:
    """Returns the sizes of a sparse model, on any device, and of its dense twin.

    Args:
        model: no engine wraps it.
        cost: of the same model.
    """
    layers = sparse_layers(model).values()
    mask_bytes = sum(bits.num_bytes(layer.shape.numel()) for layer in layers)
    recently_grown_bytes = sum(bits.num_bytes(layer.num_active) for layer in layers)
    sparse = ModelSize(trainable=cost.params_active, mask_bytes=mask_bytes, statistics_bytes=mask_bytes + recently_grown_bytes)
    return sparse, ModelSize(trainable=cost.params_dense, mask_bytes=0, statistics_bytes=0)


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

    def shard(count: int) -> int:
        return -(-count // world_size)

    replicated, zero = parallel.backend in ("single", "ddp"), parallel.backend == "deepspeed"
    bf16_copy = zero and precision == "bf16"
    owned = int if replicated else shard
    held = int if replicated or (zero and parallel.zero_stage < 3) else shard
    weights = size.trainable
    sizes = {
        "values": held(weights) * (2 if bf16_copy else FP32),
        "master values": owned(weights) * FP32 if zero else 0,
        "mask": held(size.mask_bytes),
        # In bf16, stage 1 goes through an optimizer of DeepSpeed's that accumulates the whole gradient in fp32 on every rank.
        "gradients": weights * (2 + FP32) if bf16_copy and parallel.zero_stage == 1 else owned(weights) * FP32,
        "moments": owned(weights) * MOMENTS,
        "statistics": shard(size.statistics_bytes),
    }
    # A rank keeps the average of the values that its optimizer steps.
    return sizes | {"ema": owned(weights) * FP32} if ema else sizes
