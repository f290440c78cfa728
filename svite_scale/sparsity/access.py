"""The topology engine's interface to the rest: to parameters and optimizer state, whatever shards them, and modules to anneal.

Implementations for each engine are in :mod:`svite_scale.engines`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from svite_scale.errors import TopologyError


class ParameterAccess(Protocol):
    """Reads and writes one parameter of a wrapped model at a time, whatever shards it.

    Every method but :meth:`reshard`, :meth:`steps` and :meth:`local_values` is a collective: all ranks call it with the same
    parameter, and get or give the same full tensor.

    Attributes:
        steppers: the torch optimizers that step the fp32 values, or the engine's partitions of them.
    """

    steppers: list[torch.optim.Optimizer]

    def reshard(self) -> None:
        """Frees gathered copies of weights that a forward left in the model, which then has its sharded ones again. Local."""

    def steps(self, parameter: nn.Parameter) -> bool:
        """Returns whether the optimizer steps a parameter that has a gradient, the same on every rank. Not a collective."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Returns the full value on every rank: fp32 master values of a trainable parameter, the bytes of a mask."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replaces the full value, in the master copy and in what the next forward computes with."""

    def check_state(self, parameter: nn.Parameter, *, stepped: bool) -> None:
        """Refuses an optimizer whose state of a parameter that moves isn't where :meth:`read_moment` finds it, and values
        that aren't the same on all ranks. A collective if ``stepped``.

        Args:
            parameter: see above.
            stepped: whether the optimizer has stepped it, so that there must be state if there is any at all.

        Raises:
            TopologyError: names the optimizer and the state.
        """

    def moment_names(self, parameter: nn.Parameter) -> list[str]:
        """Returns the names of the parameter's elementwise optimizer state (``exp_avg``, ...), the same on every rank.

        Empty before the first optimizer step.
        """

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Returns one kind of elementwise optimizer state, fp32, shaped like the parameter."""

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Replaces what :meth:`read_moment` returned."""

    def local_values(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """Returns this rank's part of the values that the optimizer steps, and where it begins. Not a collective.

        Returns:
            A view, fp32 ``[any]``, and its offset in the flat parameter; what lies past the parameter's end is padding.
        """


class TrackedTensors(Protocol):
    """A tensor per parameter, kept beside the engine's, with an entry for each weight: an average of the weights, say.

    :meth:`~svite_scale.sparsity.topology.engine.TopologyEngine.track` has it follow the topology as the values do: at an update
    a kept weight keeps its entry, and a grown weight's entry starts as the weight does.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Returns the full tensor of one parameter, shaped like it, on every rank. A collective."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replaces what :meth:`read` returned. A collective."""


class Annealed:
    """Base of modules that change with the progress of training. The topology engine anneals them before each step."""

    def anneal(self, progress: float) -> None:
        """Prepares the module for the next step.

        Args:
            progress: fraction of training that is done, 0 to 1.
        """
        raise NotImplementedError


class AuxiliaryClassifier:
    """Base of modules within a model that classify the images too, and learn from the loss of their own logits.

    Attributes:
        logits: ``[batch, classes]`` of the last forward in training, until they are taken.
        were_taken: whether logits were taken since the last optimizer step.
    """

    logits: Tensor | None = None
    were_taken: bool = False

    def take_logits(self) -> Tensor:
        """Returns the logits and lets go of them.

        Raises:
            TopologyError: there was no forward in training since the last call.
        """
        if self.logits is None:
            raise TopologyError(
                "the token selectors have no logits for their loss; call selector_loss once after each forward of the model in "
                "training mode, with gradients"
            )
        logits, self.logits, self.were_taken = self.logits, None, True
        return logits

    def end_step(self) -> None:
        """Forgets the logits of an optimizer step. The topology engine calls it after each one.

        Raises:
            TopologyError: none were taken, so the module learnt nothing.
        """
        # Activation checkpointing computes them again, after they were taken.
        learnt = self.were_taken or self.logits is None
        self.logits, self.were_taken = None, False
        if not learnt:
            raise TopologyError(
                "the token selectors didn't learn in this step, because nobody computed their loss; add "
                "svite_scale.selector_loss(model, targets) to the loss"
            )


def auxiliary_classifiers(model: nn.Module) -> list[AuxiliaryClassifier]:
    """Returns the auxiliary classifiers within a model, wrapped by an engine or not, in order."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryClassifier)]
