"""The engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The engine that shards the training state."""

    backend: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    zero_stage: Literal[1, 2, 3] = 3
    """For ``backend: deepspeed``."""
