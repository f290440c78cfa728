"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svite_scale.sparsity.access import ParameterAccess


class Ema:
    """average = decay * average + (1 - decay) * weight, after each optimizer step, as timm's ``ModelEmaV3`` has it.

    Sharded as the engine shards the fp32 values: each rank keeps the average of those it steps, so :meth:`update` needs no
    collective. It follows the topology as values do (:class:`~svite_scale.sparsity.access.FollowsTopology`): the average of a
    dropped weight vanishes, a grown weight's begins with the weight itself, a regrown weight's goes on.

    Attributes:
        decay: see above.
        parts: by trainable parameter, this rank's part, as ``access.local_values`` cuts it.
    """

    def __init__(self, model: nn.Module, access: ParameterAccess, decay: float) -> None:
        """Begins with the model's weights.

        Args:
            model: as it was before an engine wrapped it; wrapped by now.
            access: to its parameters.
            decay: see the class.
        """
        self.decay = decay
        self._access = access
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parts = {parameter: self._values(parameter).clone() for parameter in self._parameters}

    @torch.no_grad()
    def update(self) -> None:
        """One optimizer step is done. Local."""
        values = [self._values(parameter) for parameter in self._parameters]
        torch._foreach_lerp_(list(self.parts.values()), values, 1.0 - self.decay)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full average of one parameter, fp32, shaped like it, on every rank. A collective."""
        # Put in the place of the values for a moment, the engine gathers it as it gathers these.
        self._exchange(parameter)
        average = self._access.read(parameter).clone()
        self._exchange(parameter)
        return average

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Replaces what :meth:`read` returned. Local."""
        _, offset = self._access.local_values(parameter)
        part = self.parts[parameter]
        own = average.flatten()[offset : offset + part.numel()]
        part[: own.numel()].copy_(own)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within it, the model computes with the average; afterwards, with the weights as they were, bit by bit.

        A collective, one parameter at a time. The weights meanwhile take the memory of the average, so nothing may be saved or
        stepped.
        """
        self._swap()
        # No finally: after an error on one rank, no rank could rely on the others to come to the collectives.
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter in self._parameters:
            self._exchange(parameter)
            # What forward computes with follows the fp32 values only when they are written.
            self._access.write(parameter, self._access.read(parameter).clone())

    @torch.no_grad()
    def _exchange(self, parameter: nn.Parameter) -> None:
        values, part = self._values(parameter), self.parts[parameter]
        held = values.clone()
        values.copy_(part)
        part.copy_(held)

    def _values(self, parameter: nn.Parameter) -> Tensor:
        return self._access.local_values(parameter)[0]
