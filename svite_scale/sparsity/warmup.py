"""A gentler start for the weights that an update has grown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.layers import PackedLayer


class GrownWarmup:
    """Learning rate of the weights grown at the last update: a line from 1/steps of it to the whole, over ``steps`` steps.

    Optimizers have one learning rate per group of parameters, so this scales down what their step did to these weights, weight
    decay included, on each rank's own part of them. No collective.
    """

    def __init__(self, layers: Iterable[PackedLayer], access: ParameterAccess, steps: int) -> None:
        """Hooks the optimizer's step; ``steps`` is at least 1."""
        self.layers = list(layers)
        self.access = access
        self.steps = steps
        self._share = 1.0
        self._grown: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        access.optimizer.register_step_pre_hook(self._remember)
        access.optimizer.register_step_post_hook(self._scale)

    def start(self, layer: PackedLayer, grown: Tensor) -> None:
        """From now on warms up these weights of a layer, bool ``[k]``, and no others; local."""
        local, offset = self.access.local_values(layer.values)
        mine = grown[offset : offset + local.numel()]
        self._grown[layer.name] = mine.nonzero().squeeze(1)

    def prepare(self, steps_since_update: int) -> None:
        """Sets the share of the learning rate for the optimizer's next step, the first of which follows 0 steps."""
        self._share = min(1.0, (steps_since_update + 1) / self.steps)
        if self._share == 1.0:
            self._grown.clear()

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self._before = {layer.name: self._values(layer) for layer in self.layers if layer.name in self._grown}

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for layer in self.layers:
            if layer.name in self._before:
                scaled = torch.lerp(self._before[layer.name], self._values(layer), self._share)
                self.access.local_values(layer.values)[0][self._grown[layer.name]] = scaled
        self._before.clear()

    def _values(self, layer: PackedLayer) -> Tensor:
        """This rank's part of the layer's grown weights, a copy."""
        return self.access.local_values(layer.values)[0][self._grown[layer.name]]
