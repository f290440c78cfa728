"""A run's config: nested sections, each the options of a component, which declares them beside itself.

A YAML file and ``dotted.key=value`` overrides become a :class:`Config` through :mod:`svite_scale.config.load`. What takes more
than one section to tell is checked by :mod:`svite_scale.config.validate`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.data.options import DataConfig
from svite_scale.engines.options import ParallelConfig
from svite_scale.errors import ConfigError, OptionError
from svite_scale.models.options import DistillationConfig, ModelConfig, SparseModelOptions
from svite_scale.options import options, options_of
from svite_scale.sparsity.options import DropSchedule, MethodOptions, TopologyOptions
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.tracking.options import TrackingConfig
from svite_scale.train.options import GuardConfig, OptimizerConfig, TrainConfig


@options
class SparsityConfig(DropSchedule, SparseModelOptions):
    """The sparse parts of a model, and how their topology moves (the paper's section 3.2)."""

    update_unit: Literal["steps", "epochs"] = "steps"
    """Unit of ``update_every`` and ``update_start``."""
    update_every: Annotated[float, Field(gt=0.0, le=1e12)] = 20000.0
    """Optimizer steps, or epochs, between two topology updates."""
    update_start: Annotated[float, Field(ge=0.0, le=1e12)] = 0.0
    """No topology update comes before this optimizer step, or epoch."""
    update_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Global batch that ``update_every`` and ``update_start`` are meant for, in steps: they are scaled by update_batch_size /
    global_batch_size, so that as many samples lie between two updates. Null takes them as they are."""

    def __post_init__(self) -> None:
        SparseModelOptions.__post_init__(self)
        DropSchedule.__post_init__(self)
        if self.update_unit == "epochs":
            if self.update_batch_size is not None:
                problem = "scales updates by steps, but update_unit is epochs, which scale by themselves"
                raise OptionError("update_batch_size", self.update_batch_size, problem, "leave it null")
            return
        for name, value in (("update_every", self.update_every), ("update_start", self.update_start)):
            if not value.is_integer():
                raise OptionError(name, value, "is no whole number of steps", "round it, or set update_unit=epochs")


@options
class Config:
    """A whole run."""

    run_dir: str
    """Directory of the run's files; must not hold another run unless it is resumed."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Of everything random: first weights and masks, order of the samples, augmentation, token noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def micro_batch_size(self, world_size: int) -> int:
        """Returns the samples that one rank computes at a time.

        Raises:
            ConfigError: the global batch doesn't divide.
        """
        parts = world_size * self.train.accumulation_steps
        size, rest = divmod(self.train.global_batch_size, parts)
        if rest or not size:
            raise ConfigError(
                "train.global_batch_size",
                self.train.global_batch_size,
                f"is not divisible by world size ({world_size}) x train.accumulation_steps ({self.train.accumulation_steps})",
                f"use a multiple of {parts}",
            )
        return size

    def update_schedule(self, steps_per_epoch: float, total_steps: int) -> UpdateSchedule:
        """Returns when a run of ``total_steps`` optimizer steps updates its topology."""
        sparsity = self.sparsity
        if sparsity.update_unit == "epochs":
            scale = steps_per_epoch
        else:
            scale = (sparsity.update_batch_size or self.train.global_batch_size) / self.train.global_batch_size
        return UpdateSchedule(
            total_steps=total_steps,
            update_every=max(1, round(sparsity.update_every * scale)),
            start_step=round(sparsity.update_start * scale),
            unit_drop_fraction=sparsity.structured.drop_fraction,
            **options_of(DropSchedule, sparsity),
        )

    def topology_options(self) -> TopologyOptions:
        """Returns which weights a run moves, and how."""
        return TopologyOptions(seed=self.seed, **options_of(MethodOptions, self.sparsity))
