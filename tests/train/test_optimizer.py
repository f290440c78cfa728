"""How large the learning rate is, what it is at each step, and which optimizer takes it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from svite_scale.config.schema import Config
from svite_scale.sparsity.parameter_groups import parameter_groups
from svite_scale.train.optimizer import OPTIMIZERS, build_optimizer, build_schedule, peak_lr
from svite_scale.train.options import OptimizerConfig, TrainConfig


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_optimizer_passes_the_numbers_of_the_config(name: str) -> None:
    config = OptimizerConfig(name=name, lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = build_optimizer(nn.Linear(3, 4), config)
    assert type(optimizer).__name__.lower() == name
    for group, decay in zip(optimizer.param_groups, [0.1, 0.0], strict=True):
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (3e-3, (0.8, 0.95), 1e-6, decay)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_step_equals_the_plain_step(name: str) -> None:
    """The fused step agrees with torch's plain one, over more elements than fit whole vectors."""
    torch.manual_seed(0)
    config = OptimizerConfig(name=name, lr=3e-3, weight_decay=0.1)  # type: ignore[arg-type]
    model, plain_model = (nn.Linear(37, 11) for _ in range(2))
    plain_model.load_state_dict(model.state_dict())
    optimizer = build_optimizer(model, config)
    groups = parameter_groups(plain_model, 0.1)
    plain = OPTIMIZERS[name](groups, lr=3e-3, betas=config.betas, eps=config.eps, foreach=False)  # type: ignore[call-arg]
    assert bool(optimizer.defaults.get("fused")) == (name in ("adam", "adamw"))
    for _ in range(3):
        x = torch.randn(5, 37)
        for each in (model, plain_model):
            each.zero_grad()
            each(x).square().sum().backward()
        optimizer.step()
        plain.step()
    for parameter, expected in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_peak_lr_scales_linearly_with_the_batch_size() -> None:
    scaled = OptimizerConfig(lr=5e-4, lr_batch_size=512)
    assert peak_lr(scaled, 512) == 5e-4
    assert peak_lr(scaled, 1024) == pytest.approx(1e-3)
    assert peak_lr(scaled, 64) == pytest.approx(6.25e-5)
    assert peak_lr(replace(scaled, lr_batch_size=None), 1024) == 5e-4


def closed_form(step: int, peak: float, warmup: int, total: int, start: float, low: float) -> float:
    """A line from ``start``, reaching ``peak`` at the end of warm-up; then where a cosine over the whole run is by then."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * step / total)) / 2


def rates(config: Config, steps: range, steps_per_epoch: int) -> list[list[float]]:
    """The learning rate of both groups at each step, of a schedule that begins there."""
    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=123.0)
    schedule = build_schedule(optimizer, config, steps_per_epoch, config.train.epochs * steps_per_epoch)
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize(("warmup_epochs", "warmup_steps"), [(0.0, 0), (1.5, 15), (5.0, 50)])
def test_schedule_is_warm_up_then_cosine_and_begins_at_any_step(
    tmp_path: Path, warmup_epochs: float, warmup_steps: int
) -> None:
    recipe = OptimizerConfig(lr=2e-3, lr_batch_size=64, warmup_epochs=warmup_epochs, warmup_lr=1e-5, min_lr=1e-4)
    config = Config(run_dir=str(tmp_path), optimizer=recipe, train=TrainConfig(epochs=8, global_batch_size=128))
    expected = [closed_form(step, 4e-3, warmup_steps, 80, 1e-5, 1e-4) for step in range(80)]
    straight = rates(config, range(80), 10)
    assert straight == [[pytest.approx(rate, rel=1e-9)] * 2 for rate in expected]
    assert max(expected) <= 4e-3
    for first in (1, 14, 15, 37, 79):
        assert rates(config, range(first, 80), 10) == straight[first:]


def test_schedule_lowers_its_floors_when_the_peak_is_below_them(tmp_path: Path) -> None:
    """A tiny batch scales the peak below ``min_lr``: the rate must not rise above it."""
    recipe = OptimizerConfig(lr=5e-4, lr_batch_size=512, warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-4)
    config = Config(run_dir=str(tmp_path), optimizer=recipe, train=TrainConfig(epochs=2, global_batch_size=8))
    assert rates(config, range(20), 10) == [[pytest.approx(5e-4 * 8 / 512)] * 2] * 20
