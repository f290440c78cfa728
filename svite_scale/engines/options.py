"""The engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from svite_scale.options import options, whole_choice


@options
class ParallelConfig:
    """The engine that shards the training state."""

    backend: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    """``single`` is one process; ``ddp`` holds the whole state on every rank; ``fsdp2`` and ``deepspeed`` shard it."""
    zero_stage: Annotated[Literal[1, 2, 3], BeforeValidator(whole_choice)] = 3
    """For ``backend: deepspeed``: 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too."""

    @property
    def engine(self) -> str:
        """The engine's name, with the stage of ZeRO where it has one."""
        return f"deepspeed ZeRO-{self.zero_stage}" if self.backend == "deepspeed" else self.backend
