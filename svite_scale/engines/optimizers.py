"""Search for the torch optimizers that step a model, in wrappers, lists and dicts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from svite_scale.errors import TopologyError


def optimizers_in(thing: Any) -> list[Optimizer]:
    """Returns the torch optimizers that an object is or holds, a wrapper before the optimizer in it."""
    return [held for _, held in _walk(thing) if isinstance(held, Optimizer)]


def steppers_in(thing: Any) -> list[Optimizer]:
    """Returns those of :func:`optimizers_in` that wrap no other: their steps change the weights.

    Raises:
        TopologyError: there is none, or its state or its gradients are of a kind that packed weights can't serve.
    """
    found = [optimizer for optimizer in optimizers_in(thing) if optimizers_in(optimizer) == [optimizer]]
    if not found:
        raise TopologyError(f"{type(thing).__name__} is no torch optimizer and holds none; pass what steps the model")
    for optimizer in found:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TopologyError(f"{name} keeps a history of all weights as one vector, which can't follow them; use AdamW")
        if getattr(optimizer, "is_second_order", False):
            raise TopologyError(
                f"{name} differentiates gradients again within its step, which would be recorded as gradients of the loss; "
                "use AdamW"
            )
    return found


def stray_tensors(thing: Any, parameter: nn.Parameter, local: Tensor, *, larger: bool) -> Iterator[str]:
    """Yields paths of tensors shaped like a parameter that optimizers keep outside its ``state``: slow weights in a list, say.

    Args:
        thing: as in :func:`optimizers_in`.
        parameter: stepped by it.
        local: this rank's part of the parameter.
        larger: whether tensors of more elements count too: of all parameters, one after another.
    """
    for path, held in _walk(thing):
        if not isinstance(held, Tensor) or isinstance(held, nn.Parameter) or not held.is_floating_point():
            continue
        same = held.shape in (parameter.shape, local.shape) or (larger and held.numel() >= parameter.numel())
        if same and held.numel() > 1 and held is not parameter.grad and held.data_ptr() != local.data_ptr():
            yield path


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Optimizers and tensors within something, a wrapper before what it wraps, with the paths to them. What an optimizer keeps
    as the state of a parameter is where it should be, and isn't among them.
    """
    seen: dict[int, Any] = {}  # with the things themselves, so that no other gets the id of one of them
    name = type(root).__name__
    stack = [*reversed(list(_attributes(name, root))), (name, root)]
    while stack:
        path, thing = stack.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor | Optimizer):
            yield path, thing
        stack += reversed(list(_parts(path, thing)))


def _parts(path: str, thing: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        return [(f"{path}[{key if isinstance(key, str) else '...'}]", value) for key, value in thing.items()]
    if isinstance(thing, list | tuple):
        return [(f"{path}[{number}]", value) for number, value in enumerate(thing)]
    if isinstance(thing, MethodType):
        return [(path, thing.__self__)]
    # Nothing else is looked into: a trainer or a scheduler holds tensors of other kinds.
    is_wrapper = not isinstance(thing, type | Tensor) and hasattr(thing, "param_groups")
    return _attributes(path, thing) if isinstance(thing, Optimizer) or is_wrapper else ()


def _attributes(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    for name, value in getattr(thing, "__dict__", {}).items():
        if name == "state" and isinstance(value, Mapping):
            value = {key: entry for key, entry in value.items() if not isinstance(key, Tensor)}
        yield f"{path}.{name}", value
