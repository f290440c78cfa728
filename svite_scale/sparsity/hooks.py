"""Gradient hooks that operators find at run time.

A growth window sets a hook on each sparse layer, and removes it after the window. A compiled graph must not change with that,
so a layer's products take no hook but the layer's handle, a tensor. An operator inside the backward finds out by the handle
whether the layer has a hook at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

GradientHook = Callable[[Tensor], None]
"""Takes what a layer's growth scores are made of, ``[growth_numel]`` in any shape, inside its backward. May be a collective."""

_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = count()


def new_handle(layer: object) -> Tensor:
    """Returns a handle for a layer with an attribute ``gradient_hook``: int64, 0-dim, on the CPU. The layer isn't kept alive.

    A compiled forward takes a tensor as an input. It would be compiled again for each number.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def recording_layer(handle: Tensor) -> Any:
    """Returns the layer that a handle was made for; None if it has no hook, or is gone."""
    layer = _LAYERS.get(int(handle))
    return None if layer is None or layer.gradient_hook is None else layer
