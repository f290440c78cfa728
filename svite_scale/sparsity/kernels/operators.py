"""The products with packed weights as operators of torch, which ``torch.export``, ``torch.compile`` and vmap take as they are.

They are ``torch.ops.svite_scale.expand``, ``compress`` and so on. A program exported with them runs wherever
this package is imported. :mod:`svite_scale.sparsity.layers.packed` differentiates them, since ``torch.func`` knows
nothing of an operator's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from svite_scale.sparsity import kernels
from svite_scale.sparsity.kernels import block_products

LIBRARY = torch.library.Library("svite_scale", "DEF")
LIBRARY.define("expand(Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("compress(Tensor dense, Tensor mask, SymInt num_active) -> Tensor")
LIBRARY.define("block_product(Tensor x, Tensor values, Tensor mask, Tensor? bias, SymInt[] shape) -> Tensor")
LIBRARY.define("block_transposed_product(Tensor grad, Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("block_active_gradient(Tensor grad, Tensor x, Tensor mask, SymInt[] size) -> Tensor")
# Not by torch.library.custom_op, whose wrappers would cost each call a third of what the kernels of a small layer take.
expand, compress = torch.ops.svite_scale.expand.default, torch.ops.svite_scale.compress.default
block_product = torch.ops.svite_scale.block_product.default
block_transposed_product = torch.ops.svite_scale.block_transposed_product.default
block_active_gradient = torch.ops.svite_scale.block_active_gradient.default


@torch.library.impl(LIBRARY, "expand", "CompositeExplicitAutograd")
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return kernels.expand(values, mask, torch.Size(shape))


@torch.library.impl(LIBRARY, "compress", "CompositeExplicitAutograd")
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return kernels.compress(dense, mask, num_active)


@torch.library.impl(LIBRARY, "block_product", "CompositeExplicitAutograd")
def _(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return block_products.product(x, values, mask, bias, torch.Size(shape))


@torch.library.impl(LIBRARY, "block_transposed_product", "CompositeExplicitAutograd")
def _(grad: Tensor, values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return block_products.transposed_product(grad, values, mask, torch.Size(shape))


@torch.library.impl(LIBRARY, "block_active_gradient", "CompositeExplicitAutograd")
def _(grad: Tensor, x: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
    return block_products.active_gradient(grad, x, mask, torch.Size(size))


@torch.library.register_fake("svite_scale::expand")
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


@torch.library.register_fake("svite_scale::compress")
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return dense.new_empty(num_active)


@torch.library.register_fake("svite_scale::block_product")
def _(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.register_fake("svite_scale::block_transposed_product")
def _(grad: Tensor, values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


@torch.library.register_fake("svite_scale::block_active_gradient")
def _(grad: Tensor, x: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
    return x.new_empty(size)


def _one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Returns the rule of vmap for an operator, some of whose tensors are batched."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        columns = (
            value.unbind(dim) if isinstance(value, Tensor) and dim is not None else [value] * info.batch_size
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        return torch.stack([operator(*row) for row in zip(*columns, strict=True)]), 0

    return rule


for _operator in (expand, compress, block_product, block_transposed_product, block_active_gradient):
    torch.library.register_vmap(_operator, _one_by_one(_operator))
