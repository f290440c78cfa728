"""The optimizer, and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from svite_scale.config.schema import Config
from svite_scale.sparsity.parameter_groups import parameter_groups
from svite_scale.train.options import OptimizerConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}
FUSED = {"adam", "adamw"}
"""Optimizers that torch steps in one pass over memory, on the CPU and on GPUs."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds the optimizer of a model's trainable parameters. The schedule sets its learning rate before each step."""
    groups = parameter_groups(model, config.weight_decay)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name in FUSED:
        options["fused"] = True
    return OPTIMIZERS[config.name](groups, **options)


def peak_lr(config: OptimizerConfig, global_batch_size: int) -> float:
    """Returns the learning rate after warm-up: ``lr``, scaled linearly with the batch size if ``lr_batch_size`` is set."""
    return config.lr if config.lr_batch_size is None else config.lr * global_batch_size / config.lr_batch_size


def build_schedule(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: float, total_steps: int
) -> CosineLRScheduler:
    """Builds timm's schedule of warm-up and cosine. Call ``step_update(step)`` before each optimizer step."""
    recipe = config.optimizer
    lr = peak_lr(recipe, config.train.global_batch_size)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps,
        lr_min=min(recipe.min_lr, lr),
        warmup_t=round(recipe.warmup_epochs * steps_per_epoch),
        warmup_lr_init=min(recipe.warmup_lr, lr),
        t_in_epochs=False,
    )
