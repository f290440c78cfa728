"""When checkpoints are saved, how, and which are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from svite_scale.options import options


@options
class CheckpointConfig:
    """Saving. Whatever is set here, the end of the run is saved too."""

    every_epochs: Annotated[int | None, Field(ge=1)] = None
    every_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps; beside ``every_epochs``, not instead of it."""
    keep_last: Annotated[int | None, Field(ge=1)] = 3
    """How many of the newest are kept; null keeps all."""
    keep_every_epochs: Annotated[int | None, Field(ge=1)] = None
    """Those of every so many epochs are kept for good, whatever ``keep_last`` is."""
    background: bool = True
    """Training goes on while a copy in CPU memory is written. False waits until it is on the disk."""
    on_error: Literal["continue", "stop"] = "continue"
    """What becomes of the run when a save fails (disk full, say): ``continue`` warns, counts it in the metrics as
    ``failed_saves``, and tries again at the next save; ``stop`` ends the run with the error."""
