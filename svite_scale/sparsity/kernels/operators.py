"""The products with packed weights as operators of torch, which ``torch.export``, ``torch.compile`` and vmap take as they are.

They are ``torch.ops.svite_scale.expand``, ``compress`` and so on. A program exported with them runs wherever
this package is imported. :mod:`svite_scale.sparsity.layers.packed` differentiates them, since ``torch.func`` knows
nothing of an operator's own rule.

``record_gradient`` and ``block_active_gradient`` are called in backwards, and pass gradients to the hooks of layers that are
recorded; see :mod:`svite_scale.sparsity.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.effects import EffectType

from svite_scale.sparsity import hooks, kernels
from svite_scale.sparsity.kernels import block_products

LIBRARY = torch.library.Library("svite_scale", "DEF")
LIBRARY.define("expand(Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
# For backwards. If a backward called expand, a compiler would keep what the forward expanded, for as long.
LIBRARY.define("expand_again(Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("compress(Tensor dense, Tensor mask, SymInt num_active) -> Tensor")
LIBRARY.define("block_product(Tensor x, Tensor values, Tensor mask, Tensor? bias, SymInt[] shape) -> Tensor")
LIBRARY.define("block_transposed_product(Tensor grad, Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("block_active_gradient(Tensor grad, Tensor x, Tensor mask, SymInt[] size, Tensor? handle) -> Tensor")
LIBRARY.define("record_gradient(Tensor gradient, Tensor? x, Tensor? attn_mask, Tensor handle) -> ()")
for _name in ("block_active_gradient", "record_gradient"):
    # A compiled graph then keeps each call, in order: two equal gradients add up, and hooks are collectives.
    LIBRARY._register_effectful_op(f"svite_scale::{_name}", EffectType.ORDERED)
# Not by torch.library.custom_op, whose wrappers would cost each call a third of what the kernels of a small layer take.
expand, compress = torch.ops.svite_scale.expand.default, torch.ops.svite_scale.compress.default
expand_again = torch.ops.svite_scale.expand_again.default
block_product = torch.ops.svite_scale.block_product.default
block_transposed_product = torch.ops.svite_scale.block_transposed_product.default
block_active_gradient = torch.ops.svite_scale.block_active_gradient.default
record_gradient = torch.ops.svite_scale.record_gradient.default


@torch.library.impl(LIBRARY, "expand", "CompositeExplicitAutograd")
@torch.library.impl(LIBRARY, "expand_again", "CompositeExplicitAutograd")
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
@torch.no_grad()
def _(grad: Tensor, x: Tensor, mask: Tensor, size: Sequence[int], handle: Tensor | None) -> Tensor:
    layer = None if handle is None else hooks.recording_layer(handle)
    if layer is None:
        return block_products.active_gradient(grad, x, mask, torch.Size(size))
    dense = torch.atleast_2d(grad).flatten(0, -2).t() @ torch.atleast_2d(x).flatten(0, -2)
    layer.record_gradient(dense)
    return block_products.compress(dense, mask, layer.grid, size[0])


@torch.library.impl(LIBRARY, "record_gradient", "CompositeExplicitAutograd")
@torch.no_grad()
def _(gradient: Tensor, x: Tensor | None, attn_mask: Tensor | None, handle: Tensor) -> None:
    layer = hooks.recording_layer(handle)
    if layer is not None:
        layer.record_gradient(gradient, *(tensor for tensor in (x, attn_mask) if tensor is not None))


@torch.library.register_fake("svite_scale::expand")
@torch.library.register_fake("svite_scale::expand_again")
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
def _(grad: Tensor, x: Tensor, mask: Tensor, size: Sequence[int], handle: Tensor | None) -> Tensor:
    return x.new_empty(size)


@torch.library.register_fake("svite_scale::record_gradient")
def _(gradient: Tensor, x: Tensor | None, attn_mask: Tensor | None, handle: Tensor) -> None:
    pass


def _samples(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Returns an operator's inputs for each sample of vmap's batch. Some of its tensors are batched."""
    columns = (
        value.unbind(dim) if isinstance(value, Tensor) and dim is not None else [value] * info.batch_size
        for value, dim in zip(inputs, in_dims, strict=True)
    )
    return zip(*columns, strict=True)


def _one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Returns the rule of vmap for an operator."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return torch.stack([operator(*row) for row in _samples(info, in_dims, inputs)]), 0

    return rule


for _operator in (expand, expand_again, compress, block_product, block_transposed_product, block_active_gradient):
    torch.library.register_vmap(_operator, _one_by_one(_operator))


@torch.library.register_vmap(record_gradient)
def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[None, None]:
    for row in _samples(info, in_dims, inputs):
        record_gradient(*row)
    return None, None
