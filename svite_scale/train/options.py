"""The optimizer, the length of training, what is written when, and what happens when something goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from svite_scale.errors import OptionError
from svite_scale.options import options

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


@options
class OptimizerConfig:
    """The optimizer and its schedule: linear warm-up, then a cosine, by optimizer step."""

    name: Literal["adamw", "adam", "nadam", "radam"] = "adamw"
    """The torch optimizer of this name."""
    lr: Annotated[float, Field(gt=0.0)] = 5e-4
    """Learning rate after the warm-up, for a batch of ``lr_batch_size``."""
    lr_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Batch size that ``lr`` is meant for: the rate used is lr * global_batch_size / lr_batch_size. Null uses lr as it is."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Of the values of packed layers and of matrices; biases and norms have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the average of the square, so that nothing is divided by 0."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """Epochs over which the learning rate rises from ``warmup_lr`` to ``lr``; 0 is off."""
    warmup_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    """Learning rate at the start of the warm-up, not scaled with the batch; at most the rate that the warm-up ends with."""
    min_lr: Annotated[float, Field(ge=0.0)] = 1e-5
    """Learning rate at the end of the cosine, not scaled with the batch; at most the rate after the warm-up."""


@options
class TrainConfig:
    """Length, batch, precision and what is written when."""

    epochs: Annotated[int, Field(ge=1)] = 300
    """Passes over the training samples."""
    max_steps: Annotated[int | None, Field(ge=1)] = None
    """Stop after this many optimizer steps; schedules still span ``epochs``. Null runs all epochs."""
    global_batch_size: Annotated[int, Field(ge=1)] = 1024
    """Samples in one optimizer step, over all ranks and accumulation steps."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches whose gradients one optimizer step averages."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` computes in bfloat16; the optimizer's master values stay fp32."""
    compile: bool = False
    """Compile the model, block by block, with ``torch.compile``, which the first steps then wait for. Needs a C++ compiler."""
    clip_grad_norm: Annotated[float | None, Field(gt=0.0)] = None
    """Largest L2 norm of the whole gradient; null is off, on every backend."""
    ema_decay: Annotated[float | None, Field(ge=0.0, lt=1.0)] = None
    """Decay, per optimizer step, of an exponential moving average of the weights; null keeps none."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between two lines of metrics."""
    eval_every_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs between two evaluations; the end of the run is always evaluated."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples that a rank evaluates at a time."""
    eval_ema: bool = False
    """Evaluate the average of the weights too, as ``eval_ema_accuracy`` and the like."""

    def __post_init__(self) -> None:
        if self.eval_ema and self.ema_decay is None:
            raise OptionError("eval_ema", True, "evaluates an average that isn't kept", "set ema_decay, 0.9999 say")


@options
class GuardConfig:
    """Ranks that die or hang, gradients that aren't finite, and losses that spike."""

    hang_timeout_s: Annotated[float | None, Field(ge=1.0, le=86_400.0)] = 600.0
    """Seconds from a rank's last sign of life, or the last progress of the slowest rank, to the end of all processes. Must be
    longer than any one phase: a micro-batch with a topology update, or one that compiles; a save; a batch of evaluation. Null
    waits for ever."""
    max_nonfinite_steps: Annotated[int | None, Field(ge=1)] = 10
    """Steps whose loss or gradient isn't finite are skipped; so many in a row stop the run. Costs a wait for the gradient's
    norm in each step, and with FSDP2, unless gradients are clipped, a scalar all-reduce. Null doesn't look, but DeepSpeed does,
    and skips them by itself."""
    spike_factor: Annotated[float | None, Field(gt=1.0)] = None
    """A loss in the metrics above this times the mean of the 16 before it takes the run back to its last checkpoint, and the
    batches since then are left out. Null never does."""
    max_rollbacks: Annotated[int, Field(ge=1)] = 3
    """The next spike after so many stops the run."""
