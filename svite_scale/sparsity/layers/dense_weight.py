"""The dense weight that a packed layer's ``weight`` returns: what is written into it reaches the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity.kernels import is_traced


class Owner(Protocol):
    """The layer that a dense weight belongs to."""

    name: str

    def take_active(self, dense: Tensor) -> None: ...


class DenseWeight(Tensor):
    """A dense weight, made for one reader. What is written into it, or into a view or the ``data`` of it, under
    ``torch.no_grad()``, reaches its layer's active weights: ``nn.init`` and ``copy_`` work as on a masked dense weight. What
    is computed from it is a plain tensor.

    Attributes:
        owner: its layer.
        whole: the dense weight, plain, of which this may be a view.
    """

    owner: Owner
    whole: Tensor

    @classmethod
    def of(cls, dense: Tensor, owner: Owner) -> Tensor:
        """Returns ``dense`` as a weight of ``owner``; plain in graphs and transforms, where nothing is written into weights."""
        if is_traced(dense) or dense.is_inference():
            return dense
        return cls._view(dense, owner, dense)

    @classmethod
    def _view(cls, tensor: Tensor, owner: Owner, whole: Tensor) -> DenseWeight:
        view = tensor.as_subclass(cls)
        view.owner, view.whole = owner, whole
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__iter__:
            return iter(args[0].unbind())
        weights = [argument for argument in _flat(args, kwargs) if isinstance(argument, DenseWeight)]
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):  # type: ignore[attr-defined]
            raise TopologyError(f"{weights[0].owner.name}.weight: freeze and thaw values instead: values.requires_grad_(...)")
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.data.__set__ and isinstance(args[0], DenseWeight):  # type: ignore[attr-defined]
                weights[0].data.copy_(args[1])
                return weights[0].owner.take_active(weights[0].whole.detach())
            before = [(weight._version, weight.requires_grad and torch.is_grad_enabled()) for weight in weights]
            try:
                result = func(*args, **kwargs)
            except RuntimeError as error:
                if func.__name__.endswith("_") and torch.is_grad_enabled():
                    raise _recorded(weights[0]) from error
                raise
            for weight, (version, is_recorded) in zip(weights, before, strict=True):
                if weight._version != version:
                    if is_recorded:
                        raise _recorded(weight)
                    weight.owner.take_active(weight.whole.detach())
            if weights and type(result) in (list, tuple):  # of chunk, split, unbind
                return type(result)(cls._view_of(part, weights[0]) for part in result)
            return cls._view_of(result, weights[0]) if weights else result

    @classmethod
    def _view_of(cls, result: Any, weight: DenseWeight) -> Any:
        """Returns ``result`` as a view of a weight, if it is a tensor that shares its memory."""
        is_view = type(result) is Tensor and _shares_memory(result, weight.whole)
        return cls._view(result, weight.owner, weight.whole) if is_view else result


def _recorded(weight: DenseWeight) -> TopologyError:
    return TopologyError(f"{weight.owner.name}.weight: write into it under torch.no_grad(), as into any parameter")


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Returns the arguments, and those in lists of them."""
    flat: list[Any] = []
    for argument in (*args, *kwargs.values()):
        flat.extend(argument if isinstance(argument, (list, tuple)) else [argument])
    return flat


def _shares_memory(tensor: Tensor, whole: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
