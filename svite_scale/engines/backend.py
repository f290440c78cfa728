"""The protocol between the training loop and an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from svite_scale.sparsity.access import ParameterAccess, auxiliary_classifiers

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimizer of a model. An engine calls it before or after it wraps the model, as it needs."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options that an engine is set up with.

    Attributes:
        device: where the model trains.
        wrap_units: submodules that are gathered and freed one at a time (FSDP2, ZeRO-3), and compiled one by one.
        micro_batch_size: samples of one rank in one forward.
        accumulation_steps: micro-batches in one optimizer step.
        bf16: computes in bfloat16, with fp32 master values.
        compile: compiles the wrap units.
        clip_grad_norm: largest global L2 norm of the gradient; None doesn't clip.
        skip_nonfinite: doesn't apply a step if its gradient isn't finite on some rank. DeepSpeed never applies such a step.
    """

    device: torch.device
    wrap_units: Sequence[nn.Module]
    micro_batch_size: int
    accumulation_steps: int = 1
    bf16: bool = False
    compile: bool = False
    clip_grad_norm: float | None = None
    skip_nonfinite: bool = False


class StepResult(NamedTuple):
    """The outcome of one optimizer step."""

    grad_norm: Tensor | None
    """Global L2 norm of the gradient before clipping, a scalar; None if it was not computed."""
    applied: bool
    """True if the step changed the weights; the same on all ranks."""


class Backend(Protocol):
    """A wrapped model with its optimizer.

    Attributes:
        model: the module before wrapping; :attr:`access` takes its parameters.
        wrapped: the engine's module around it; its ``train()`` and ``eval()`` switch modes.
        optimizer: the torch optimizer, for learning-rate schedules.
        access: reads and writes one parameter and its optimizer state in full.
        options: the options that the engine was set up with.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    access: ParameterAccess
    options: EngineOptions

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of this rank's images ``[batch, channels, height, width]``.

        They are float ``[batch, classes]``, or ``[2, batch, classes]`` if the model has a class head and a distillation head.
        A collective if parameters are sharded: all ranks call it.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of the mean loss of one micro-batch, a scalar. A collective: all ranks call it."""

    def step(self) -> StepResult:
        """Averages the gradients over ranks and micro-batches, clips them, steps the optimizer, and clears the gradients.

        A step that isn't applied leaves weights and optimizer state as they were. A collective: all ranks call it.
        """

    def init_optimizer_state(self, images: Tensor) -> None:
        """Creates the optimizer's state, so that a checkpoint can be loaded into it. A collective: all ranks call it.

        Optimizers create their state at their first step, so this takes a step with gradients of zero and a learning rate of
        zero. No weight changes.

        Args:
            images: any micro-batch, float ``[micro_batch_size, channels, height, width]``.
        """
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for _ in range(self.options.accumulation_steps):
            outputs = [self.forward(images), *(module.take_logits() for module in auxiliary_classifiers(self.model))]
            self.backward(torch.stack([output.float().sum() for output in outputs]).sum() * 0.0)
        self.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
