"""The options of checkpoints: when and how they are saved, and which are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from svite_scale.options import options


@options
class CheckpointConfig:
    """Options of saving. The end of the run is always saved too."""

    every_epochs: Annotated[int | None, Field(ge=1)] = None
    """Epochs between two saves; null is off."""
    every_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps between two saves, in addition to ``every_epochs``; null is off."""
    keep_last: Annotated[int | None, Field(ge=1)] = 3
    """Number of the newest to keep; null keeps all."""
    keep_every_epochs: Annotated[int | None, Field(ge=1)] = None
    """Keeps the checkpoint of every so many epochs for good, whatever ``keep_last`` is."""
    background: bool = True
    """Training continues while a copy in CPU memory is written. False waits until it is on the disk."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a save fails, on a full disk say: ``continue`` warns, counts it in the metrics as
    ``failed_saves``, and tries again at the next save; ``stop`` ends the run with the error."""
