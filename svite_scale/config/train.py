"""The optimizer, the length of training, and what is written when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from svite_scale.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule: linear warm-up, then a cosine, by optimizer step."""

    name: Literal["adamw", "adam", "nadam", "radam"] = "adamw"
    lr: Annotated[float, Bounds(above=0.0)] = 5e-4
    lr_batch_size: Annotated[int | None, Bounds(low=1)] = None
    """Batch size that ``lr`` is meant for: the rate used is lr * global_batch_size / lr_batch_size. Null uses lr as it is."""
    weight_decay: Annotated[float, Bounds(low=0.0)] = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Bounds(above=0.0)] = 1e-8
    warmup_epochs: Annotated[float, Bounds(low=0.0)] = 0.0
    warmup_lr: Annotated[float, Bounds(low=0.0)] = 1e-6
    min_lr: Annotated[float, Bounds(low=0.0)] = 1e-5


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and what is written when."""

    epochs: Annotated[int, Bounds(low=1)] = 300
    max_steps: Annotated[int | None, Bounds(low=1)] = None
    """Stop after this many optimizer steps; schedules still span ``epochs``. Null runs all epochs."""
    global_batch_size: Annotated[int, Bounds(low=1)] = 1024
    """Samples in one optimizer step, over all ranks and accumulation steps."""
    accumulation_steps: Annotated[int, Bounds(low=1)] = 1
    """Micro-batches whose gradients one optimizer step averages."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16; the optimizer's master values stay fp32."""
    clip_grad_norm: Annotated[float | None, Bounds(above=0.0)] = None
    """Largest L2 norm of the whole gradient; null is off, on every backend."""
    ema_decay: Annotated[float | None, Bounds(low=0.0)] = None
    """Decay, per optimizer step, of an exponential moving average of the weights; null keeps none."""
    log_every: Annotated[int, Bounds(low=1)] = 50
    """Optimizer steps between two lines of metrics."""
    eval_every_epochs: Annotated[int, Bounds(low=1)] = 1
    eval_batch_size: Annotated[int, Bounds(low=1)] = 64
    """Samples per rank."""
    eval_ema: bool = False
    """Evaluate the average of the weights too, as ``eval_ema_accuracy`` and the like."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow, beside the run directory's own ``metrics.jsonl``."""

    mlflow: bool = True
    uri: str | None = None
    """Null is a SQLite file in the run directory's parent."""
    experiment: str = "svite_scale"
