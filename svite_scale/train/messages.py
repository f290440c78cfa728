"""The texts that a run prints at its start and at its end."""

from __future__ import annotations

import shlex

import torch

from svite_scale.config.schema import Config
from svite_scale.cost.memory import bytes_per_rank
from svite_scale.data.loader import EvalData, TrainData
from svite_scale.runtime.world import World
from svite_scale.tracking.tracker import METRICS
from svite_scale.train.build import ModelSummary
from svite_scale.train.cadence import Cadence

BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def describe_start(
    config: Config,
    world: World,
    device: torch.device,
    model: ModelSummary,
    train_data: TrainData,
    eval_data: EvalData,
    cadence: Cadence,
    resumed_step: int | None,
) -> str:
    """Returns what the run trains, on what, where, for how long, and where its files go: one line each."""
    train, cost = config.train, model.cost
    sparse, dense = (
        sum(bytes_per_rank(config.parallel, train.precision, world.size, size, ema=train.ema_decay is not None).values())
        for size in model.sizes
    )
    active = f"{cost.params_active:,} of {cost.params_dense:,} parameters, density {model.density:.4g} of the prunable ones"
    threads = "" if device.type == "cuda" else f", threads on each: {torch.get_num_threads()}"
    times = "" if train.accumulation_steps == 1 else f", {train.accumulation_steps} times"
    resumed = "" if resumed_step is None else f", resumed after step {resumed_step:,}"
    start = f", from {config.model.weights}" if config.model.weights and resumed_step is None else ""
    return as_table(
        {
            "model": f"{config.model.name}, {config.model.image_size} px{start}",
            "active": active,
            "engine": f"{config.parallel.engine}, {train.precision}{', compiled' if train.compile else ''}",
            "ranks": f"{world.size:,}, {world.local_size:,} on this machine, device {device_name(device)}{threads}",
            "memory": f"{in_bytes(sparse)} of training state on each rank, {sparse / dense:.3f} of the dense twin's",
            "data": f"{train_data.num_samples:,} samples for training, {eval_data.num_samples:,} for evaluation",
            "batch": f"{train.global_batch_size:,} samples, {config.micro_batch_size(world.size):,} on each rank{times}",
            "steps": f"{cadence.last_step:,}, {cadence.last_step / cadence.steps.per_epoch:.4g} of {train.epochs:,} epochs",
            "files": f"{config.run_dir}{resumed}",
        }
    )


def describe_end(config: Config, ui_command: str | None) -> str:
    """Returns where the files of a finished run are, and the commands that show, evaluate and export its model."""
    run = shlex.quote(config.run_dir)
    form = "sliced" if config.sparsity.is_smaller else "timm"
    rows = {
        "files": f"config.yaml, {METRICS}, summary.json and checkpoints/ in {config.run_dir}",
        "evaluate it": f"python launch/evaluate.py --run {run}",
        "see it": f"python launch/report.py --run {run}",
        "export it": f"python launch/export.py --run {run} --format {form} --out {run}/export/{form}",
    }
    return as_table(rows | ({"compare runs": ui_command} if ui_command else {}))


def as_table(rows: dict[str, str]) -> str:
    """Returns a line for each row, with the values in one column."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:{width}}{value}" for name, value in rows.items())


def device_name(device: torch.device) -> str:
    """Returns the GPU's model, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def in_bytes(count: float) -> str:
    """Returns a number of bytes with a unit that suits, such as ``1.23 GB``."""
    power = 0
    while count >= 1000 and power < len(BYTE_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {BYTE_UNITS[power]}"
