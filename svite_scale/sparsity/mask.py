"""The parameter that holds a mask's bits: never trained, and never computed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svite_scale.errors import MaskError

REMEDY = "a mask's bits can't be averaged; svite_scale.Ema is an average that follows the topology"


class Mask(nn.Parameter):
    """Bits of a mask, uint8, as a parameter that engines shard and gather, and that other libraries can't harm.

    - It stays frozen: ``requires_grad_()`` and ``requires_grad = True``, with which whole models are thawed, do nothing.
    - What is copied into it, or set as its ``data``, may be floats (as ``torch.nn.utils.vector_to_parameters`` does, and
      averages of weights whose topology is the same), but they must be whole numbers.

    An engine may put a parameter of its own in its place, as FSDP2 does, without these properties.

    Raises:
        MaskError: something else than bytes is copied into it, or it is changed in place by a computation.
    """

    def __new__(cls, bits: Tensor) -> Mask:
        return Tensor._make_subclass(cls, bits.detach().as_subclass(Tensor), False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        return memo.setdefault(id(self), Mask(plain_bits(self).clone()))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Mask, (plain_bits(self),)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.requires_grad_:
            return args[0]
        if func == Tensor.requires_grad.__set__:  # type: ignore[attr-defined]
            return None
        if func in (Tensor.copy_, Tensor.data.__set__) and isinstance(args[0], Mask):  # type: ignore[attr-defined]
            args = (args[0], _whole_bytes(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            try:
                result = func(*args, **(kwargs or {}))
            except RuntimeError as error:
                if not func.__name__.endswith("_"):  # it writes nothing
                    raise
                raise MaskError(f"{func.__name__} on a mask: {error}; {REMEDY}") from error
            # Averages are taken of these, and copied into them.
            is_same = func in (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
            return Mask(result) if is_same and type(result) is Tensor else result


def plain_bits(mask: Tensor) -> Tensor:
    """Returns the same bytes as a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return mask.detach().as_subclass(Tensor) if isinstance(mask, Mask) else mask.detach()


def _whole_bytes(numbers: Tensor) -> Tensor:
    """Returns ``numbers`` as uint8. They may differ from bytes by the rounding of an average of equal ones."""
    if not numbers.is_floating_point() or numbers.is_meta:
        return numbers
    rounded = numbers.round()
    are_bytes = ((numbers - rounded).abs() <= 0.01) & (rounded >= 0) & (rounded <= 255)
    if not bool(are_bytes.all()):
        raise MaskError(f"numbers that aren't bytes would become a mask, averages of two topologies perhaps; {REMEDY}")
    return rounded.to(torch.uint8)
