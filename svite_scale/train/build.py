"""Builds the parts of a training run from its config."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from svite_scale.checkpoint.directory import CHECKPOINTS
from svite_scale.checkpoint.load import counts_of_run
from svite_scale.config.load import flatten_config, to_dict, to_yaml
from svite_scale.config.schema import Config
from svite_scale.cost.flops import ModelCost, count_flops
from svite_scale.cost.memory import ModelSize, model_sizes
from svite_scale.data.format.patterns import check_contents, largest_label
from svite_scale.data.loader import EvalData, TrainData
from svite_scale.engines.backend import Backend, EngineOptions
from svite_scale.engines.build import build_backend
from svite_scale.errors import ConfigError
from svite_scale.models.dense import blocks
from svite_scale.models.sparse import build_sparse
from svite_scale.models.teacher import enable_distillation_heads
from svite_scale.options import in_section
from svite_scale.runtime.world import World
from svite_scale.sparsity.allocation.layer_plan import plan_density
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.tracking.tracker import Tracker
from svite_scale.train.optimizer import build_optimizer


def open_data(config: Config, world: World) -> tuple[TrainData, EvalData]:
    """Opens this rank's training and evaluation samples.

    Raises:
        ConfigError: a label is too large for the model.
        DataError: the shards can't be read.
    """
    model, train = config.model, config.train
    image_shape = (model.in_channels, model.image_size, model.image_size)
    train_data = TrainData(
        config.data,
        image_shape=image_shape,
        global_batch_size=train.global_batch_size,
        seed=config.seed,
        accumulation_steps=train.accumulation_steps,
        world=world,
    )
    eval_data = EvalData(config.data, image_shape=image_shape, batch_size=train.eval_batch_size, world=world)
    indexes = train_data.indexes + eval_data.indexes
    if config.data.verify_checksums:
        check_contents(indexes, world.rank, world.size)
    largest, place = largest_label(indexes)
    if largest >= model.num_classes:
        problem = f"is too few for labels 0 to {largest}, which is that of {place}"
        raise ConfigError("model.num_classes", model.num_classes, problem, "raise it, or correct the label")
    return train_data, eval_data


def fingerprint(data: TrainData) -> dict[str, object]:
    """Returns what a run trains on, wherever that is stored: the number of samples, and a checksum of the shards in order."""
    return {"samples": data.num_samples, "sha256": sha256("".join(index.sha256 for index in data.indexes).encode()).hexdigest()}


class ModelSummary(NamedTuple):
    """The numbers of a sparse model that a run reports."""

    density: float
    """The active fraction of the prunable weights."""
    cost: ModelCost
    """Of a forward in training."""
    sizes: tuple[ModelSize, ModelSize]
    """Of the model, and of its dense twin."""


def build_sparse_model(
    config: Config, world: World, device: torch.device, *, skip_nonfinite: bool, resume: bool
) -> tuple[Backend, ModelSummary]:
    """Builds the sparse model and wraps it in its engine. A collective: all ranks call it.

    Args:
        config: of the run.
        world: this rank's.
        device: this rank's.
        skip_nonfinite: skip steps whose gradients aren't finite.
        resume: a checkpoint is to replace all weights and masks, so no file of first ones is read.
    """
    saved = counts_of_run(Path(config.run_dir) / CHECKPOINTS) if resume else None
    model, plan = build_sparse(config.model, config.sparsity, config.seed, saved)
    cost = count_flops(model, config.model.image_size, device=device, training=True)
    summary = ModelSummary(plan_density(plan), cost, model_sizes(model, cost))
    if config.distillation.teacher is not None:
        enable_distillation_heads(model)
    options = EngineOptions(
        device=device,
        wrap_units=blocks(model),
        micro_batch_size=config.micro_batch_size(world.size),
        accumulation_steps=config.train.accumulation_steps,
        bf16=config.train.precision == "bf16",
        compile=config.train.compile,
        clip_grad_norm=config.train.clip_grad_norm,
        skip_nonfinite=skip_nonfinite,
    )
    backend = build_backend(config.parallel, model, lambda module: build_optimizer(module, config.optimizer), options)
    return backend, summary


def build_topology(config: Config, backend: Backend, steps_per_epoch: float, total_steps: int) -> TopologyEngine:
    """Builds the engine that prunes and grows the model's weights. A collective: all ranks call it.

    Raises:
        ConfigError: a window is longer than the steps between two updates.
    """
    schedule, options = config.update_schedule(steps_per_epoch, total_steps), config.topology_options()
    with in_section("sparsity"):
        return TopologyEngine(backend.model, backend.access, schedule, options, group=dist.group.WORLD)


def open_tracker(config: Config, resumed_step: int | None, world: World) -> Tracker:
    """Opens the files of the run directory, and MLflow, on the main rank.

    Args:
        config: of the run.
        resumed_step: the step after which the run resumes; None for a new run.
        world: this rank's.

    Raises:
        RunError: the run directory can't be written, or MLflow can't be used.
    """
    return Tracker(
        config.tracking,
        Path(config.run_dir),
        resumed_step,
        config_text=to_yaml(config),
        parameters=flatten_config(to_dict(config)),
        tags={"engine": config.parallel.engine, "world_size": str(world.size)},
        enabled=world.is_main,
    )
