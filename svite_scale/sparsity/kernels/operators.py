"""``expand`` and ``compress`` as operators of torch, which ``torch.export``, ``torch.compile`` and vmap take as they are.

They are ``torch.ops.svite_scale.expand`` and ``torch.ops.svite_scale.compress``. A program exported with them runs wherever
this package is imported. :mod:`svite_scale.sparsity.layers.packed` differentiates them, since ``torch.func`` knows
nothing of an operator's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from svite_scale.sparsity import kernels

LIBRARY = torch.library.Library("svite_scale", "DEF")
LIBRARY.define("expand(Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("compress(Tensor dense, Tensor mask, SymInt num_active) -> Tensor")
# Not by torch.library.custom_op, whose wrappers would cost each call a third of what the kernels of a small layer take.
expand, compress = torch.ops.svite_scale.expand.default, torch.ops.svite_scale.compress.default


@torch.library.impl(LIBRARY, "expand", "CompositeExplicitAutograd")
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return kernels.expand(values, mask, torch.Size(shape))


@torch.library.impl(LIBRARY, "compress", "CompositeExplicitAutograd")
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return kernels.compress(dense, mask, num_active)


@torch.library.register_fake("svite_scale::expand")
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


@torch.library.register_fake("svite_scale::compress")
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return dense.new_empty(num_active)


def _one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Returns the rule of vmap for an operator on elements and mask, one or both of which are batched."""

    def rule(info: Any, in_dims: tuple[int | None, ...], elements: Tensor, mask: Tensor, size: Any) -> tuple[Tensor, int]:
        rows, masks = (
            [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip((elements, mask), in_dims, strict=False)
        )
        return torch.stack([operator(row, bits, size) for row, bits in zip(rows, masks, strict=True)]), 0

    return rule


torch.library.register_vmap(expand, _one_by_one(expand))
torch.library.register_vmap(compress, _one_by_one(compress))
