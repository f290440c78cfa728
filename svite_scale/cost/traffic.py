"""Bytes that a rank sends in an optimizer step, by engine, computed from sizes alone."""

from __future__ import annotations

from svite_scale.cost.memory import FP32, ModelSize
from svite_scale.engines.options import ParallelConfig


def sent_per_step(
    parallel: ParallelConfig, precision: str, world_size: int, size: ModelSize, *, accumulation_steps: int = 1
) -> dict[str, int]:
    """Returns the bytes that one rank sends in an optimizer step without a topology update, by kind.

    Collectives count as rings, which send the least: to gather or to reduce-scatter n bytes, each of W ranks sends
    n * (W - 1) / W, and to all-reduce them twice as much. gloo's reduce-scatter is an all-reduce, so FSDP2 sends more on CPUs.

    Args:
        parallel: the engine.
        precision: ``fp32`` or ``bf16``. Gradients are reduced in fp32, weights are gathered in the precision.
        world_size: number of ranks.
        size: of the model.
        accumulation_steps: micro-batches of an optimizer step.

    Returns:
        ``gradients``; ``weights`` and ``mask``, which engines gather that shard them, or that shard the optimizer.
    """
    zero_stage = parallel.zero_stage if parallel.backend == "deepspeed" else 0
    # Of what the micro-batches of a step add up to, ZeRO-1 reduces the sum.
    reductions = 1 if zero_stage == 1 else accumulation_steps
    # DDP, ZeRO-1 and ZeRO-2 all-reduce; FSDP2 and ZeRO-3 gather what they shard for forward and backward, and reduce-scatter.
    shards_weights = parallel.backend == "fsdp2" or zero_stage == 3
    passes = reductions * (1 if shards_weights else 2)
    if shards_weights:
        weights = 2 * accumulation_steps
        # ZeRO-3 keeps what isn't trained from forward to backward.
        masks = accumulation_steps * (1 if zero_stage == 3 else 2)
    else:
        weights, masks = (1, 0) if zero_stage else (0, 0)
    itemsize = FP32 if precision == "fp32" else 2
    sent = {
        "gradients": passes * size.trainable * FP32,
        "weights": weights * size.trainable * itemsize,
        "mask": masks * size.mask_bytes,
    }
    return {kind: count * (world_size - 1) // world_size for kind, count in sent.items()}
