"""What the training loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from svite_scale.sparsity.access import ParameterAccess

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimizer of a model; called before or after wrapping, as the engine needs."""


class StepResult(NamedTuple):
    """What an optimizer step came to."""

    grad_norm: Tensor | None
    """The gradient's global L2 norm before clipping, scalar; None where nobody asked for it."""
    applied: bool
    """Whether it changed the weights; the same on all ranks."""


class Backend(Protocol):
    """A wrapped model with its optimizer.

    Attributes:
        model: the module as it was before wrapping; its parameters are what :attr:`access` takes.
        wrapped: what the engine made of it, whose ``train()`` and ``eval()`` switch modes.
        optimizer: the torch optimizer, for learning-rate schedules.
        access: reads and writes one parameter and its optimizer state in full.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    access: ParameterAccess

    def forward(self, images: Tensor) -> Tensor:
        """Logits of this rank's images, float ``[batch, classes]``; ``[2, batch, classes]`` of a student that answers twice. A
        collective where parameters are sharded.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of one micro-batch's mean loss, a scalar. A collective."""

    def step(self) -> StepResult:
        """Averages over ranks and micro-batches, clips, steps the optimizer, and clears the gradients. A collective.

        A step that isn't applied leaves weights and optimizer state as they were.
        """


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is set up with.

    Attributes:
        device: where the model trains.
        units: submodules that are gathered and freed one at a time (FSDP2, ZeRO-3).
        micro_batch_size: samples of one rank in one forward.
        accumulation_steps: micro-batches in one optimizer step.
        bf16: compute in bfloat16, with fp32 master values.
        clip_grad_norm: largest global L2 norm of the gradient, or None.
        skip_nonfinite: don't apply a step whose gradient isn't finite on some rank. DeepSpeed never does.
    """

    device: torch.device
    units: Sequence[nn.Module]
    micro_batch_size: int
    accumulation_steps: int = 1
    bf16: bool = False
    clip_grad_norm: float | None = None
    skip_nonfinite: bool = False
