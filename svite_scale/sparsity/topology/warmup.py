"""The warm-up of the weights that an update has grown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.layers.base import SparseLayer


class GrownWarmup:
    """Warms up the learning rate of the weights grown at the last update: a line from 1/steps of it to all of it.

    Optimizers have one learning rate per group of parameters, so this scales down what their step did to these weights, weight
    decay included, on each rank's own part of them. No collective.
    """

    def __init__(self, layers: Iterable[SparseLayer], access: ParameterAccess, steps: int) -> None:
        """Hooks the optimizers' steps; ``steps`` is at least 1."""
        self.layers = list(layers)
        self.access = access
        self.steps = steps
        self._fraction = 1.0
        self._grown: dict[tuple[str, str], Tensor] = {}
        self._before: dict[tuple[str, str], Tensor] = {}
        self._hooks = [optimizer.register_step_pre_hook(self._remember) for optimizer in access.steppers]
        self._hooks += [optimizer.register_step_post_hook(self._scale) for optimizer in access.steppers]

    def remove(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def start(self, layer: SparseLayer, grown: Tensor) -> None:
        """Warms up these units of a layer from now on, bool ``[k]``, and no others. Local."""
        for name, part in layer.unit_parameters().items():
            elements = grown.view(1, -1, 1).expand(part.repeats, -1, part.row_numel).flatten()
            local, offset = self.access.local_values(part.parameter)
            own = elements[offset : offset + local.numel()]
            self._grown[layer.name, name] = own.nonzero().squeeze(1)

    def prepare(self, steps_since_update: int) -> None:
        """Sets the fraction of the learning rate for the optimizer's next step, the first of which follows 0 steps."""
        self._fraction = min(1.0, (steps_since_update + 1) / self.steps)
        if self._fraction == 1.0:
            self._grown.clear()

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self.access.reshard()
        self._before = {key: values[self._grown[key]] for key, values in self._warming()}

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for key, values in self._warming():
            grown = self._grown[key]
            values[grown] = torch.lerp(self._before[key], values[grown], self._fraction)
        self._before.clear()

    def _warming(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yields this rank's part of each parameter with grown weights that isn't frozen, a view, by layer and name in it."""
        for layer in self.layers:
            for name, part in layer.unit_parameters().items():
                if (layer.name, name) in self._grown and part.parameter.requires_grad:
                    yield (layer.name, name), self.access.local_values(part.parameter)[0]
