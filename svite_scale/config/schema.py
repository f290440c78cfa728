"""What a run is configured by: nested dataclasses, one per component, with the bounds of each field beside it.

A YAML file and ``dotted.key=value`` overrides become a :class:`Config` through :mod:`svite_scale.config.load`, which checks
types, bounds and unknown keys from the annotations here. What no single field can tell is checked by
:mod:`svite_scale.config.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from svite_scale.config.bounds import Bounds
from svite_scale.config.checkpoint import CheckpointConfig
from svite_scale.config.data import AugmentConfig, DataConfig
from svite_scale.config.distillation import DistillationConfig
from svite_scale.config.guard import GuardConfig
from svite_scale.config.model import ModelConfig
from svite_scale.config.parallel import ParallelConfig
from svite_scale.config.sparsity import SparsityConfig, StructuredConfig, TokensConfig
from svite_scale.config.train import OptimizerConfig, TrackingConfig, TrainConfig
from svite_scale.errors import ConfigError

__all__ = [
    "AugmentConfig",
    "Bounds",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SparsityConfig",
    "StructuredConfig",
    "TokensConfig",
    "TrackingConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str
    """Where the run's files go; must not hold another run unless it is resumed."""
    seed: Annotated[int, Bounds(low=0, high=2**31 - 1)] = 0
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
        """Samples that one rank computes at a time.

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
