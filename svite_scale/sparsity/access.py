"""What the topology engine needs of others: parameters and optimizer state, whatever shards them, and modules to anneal."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class ParameterAccess(Protocol):
    """Reads and writes one parameter of a wrapped model at a time, whatever shards it.

    Every method but :meth:`reshard`, :meth:`steps` and :meth:`local_values` is a collective: all ranks call it with the same
    parameter, and get or give the same full tensor. Implementations for each engine are in :mod:`svite_scale.engines`.

    Attributes:
        steppers: the torch optimizers that step the fp32 values, or the engine's partitions of them.
    """

    steppers: list[torch.optim.Optimizer]

    def reshard(self) -> None:
        """Puts what the optimizer steps in its place in the model, where a forward left gathered copies of it. Local."""

    def steps(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer steps a parameter, once it has a gradient. Not a collective; the same on every rank."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full value on every rank: fp32 master values of a trainable parameter, the bytes of a mask."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replaces the full value, in the master copy and in what the next forward computes with."""

    def check_state(self, parameter: nn.Parameter, *, stepped: bool) -> None:
        """Refuses an optimizer whose state of a parameter that moves isn't where :meth:`read_moment` finds it, and values
        that aren't the same on all ranks. A collective if ``stepped``.

        Args:
            parameter: see above.
            stepped: whether it has had its share of an optimizer step, so that there must be state if there is any at all.

        Raises:
            TopologyError: names the optimizer and the state.
        """

    def moment_names(self, parameter: nn.Parameter) -> list[str]:
        """What the optimizer calls its elementwise state of the parameter (``exp_avg``, ...), the same on every rank.

        Empty before the first optimizer step.
        """

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One kind of elementwise optimizer state, fp32, shaped like the parameter."""

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Replaces what :meth:`read_moment` returned."""

    def local_values(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """This rank's part of the values that the optimizer steps, and where it begins. Not a collective.

        Returns:
            A view, fp32 ``[any]``, and its offset in the flat parameter; what lies past the parameter's end is padding.
        """


class FollowsTopology(Protocol):
    """A tensor per parameter, kept beside the engine's, whose entries belong to single weights: an average of them, say.

    One that is in :attr:`~svite_scale.sparsity.topology.engine.TopologyEngine.followers` is carried at each topology update
    as the values are: what stays keeps its entry, a grown weight's entry begins as the weight does.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full tensor of one parameter, shaped like it, on every rank. A collective."""

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
