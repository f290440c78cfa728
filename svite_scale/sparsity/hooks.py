"""Gradient hooks that operators find at run time.

A growth window sets a hook on each sparse layer, and removes it after the window. A compiled graph must not change with that,
so a layer's products take no hook but the layer's handle, a tensor. An operator inside the backward looks up the hook that
the layer has at that moment.
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
    """Returns a handle for a layer with an attribute ``gradient_hook``: int64, 0-dim, on the CPU.

    A compiled forward takes a tensor as an input, where it would be compiled again for each number. The layer isn't kept alive.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def layer_of(handle: Tensor) -> Any:
    """Returns the layer that a handle was made for; None if it is gone."""
    return _LAYERS.get(int(handle))


def hook_of(handle: Tensor) -> GradientHook | None:
    """Returns the hook of the layer that a handle was made for; None outside growth windows."""
    return getattr(layer_of(handle), "gradient_hook", None)
