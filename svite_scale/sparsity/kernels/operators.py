"""``expand`` and ``compress`` as operators of torch, which ``torch.export``, ``torch.compile`` and vmap take as they are.

They are ``torch.ops.svite_scale.expand`` and ``torch.ops.svite_scale.compress``. A program exported with them runs wherever
this package is imported. :mod:`svite_scale.sparsity.packed_weight` differentiates them, since ``torch.func`` knows nothing of
an operator's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from svite_scale.sparsity import kernels


@torch.library.custom_op("svite_scale::expand", mutates_args=())
def expand(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.expand`."""
    return kernels.expand(values, mask, torch.Size(shape))


@torch.library.custom_op("svite_scale::compress", mutates_args=())
def compress(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.compress`."""
    return kernels.compress(dense, mask, num_active)


@expand.register_fake
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


@compress.register_fake
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return dense.new_empty(num_active)


def _one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The rule of vmap for an operator on elements and mask, one or both of which are batched."""

    def rule(info: Any, in_dims: tuple[int | None, ...], elements: Tensor, mask: Tensor, size: Any) -> tuple[Tensor, int]:
        rows, masks = (
            [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip((elements, mask), in_dims, strict=False)
        )
        return torch.stack([operator(row, bits, size) for row, bits in zip(rows, masks, strict=True)]), 0

    return rule


expand.register_vmap(_one_by_one(expand))
compress.register_vmap(_one_by_one(compress))
