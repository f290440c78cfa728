"""Operators of torch, ``torch.ops.svite_scale``, which ``torch.export``, ``torch.compile`` and vmap take as they are.

``expand`` and ``compress`` are :mod:`svite_scale.sparsity.kernels`, ``block_product`` and the like are
:mod:`svite_scale.sparsity.kernels.block_products`. Those that record gradients pass them to the hook of a layer. A program
exported with operators runs wherever this package is imported. The functions of autograd in
:mod:`svite_scale.sparsity.layers` differentiate them, since ``torch.func`` knows nothing of an operator's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.effects import EffectType

from svite_scale.sparsity import hooks, kernels
from svite_scale.sparsity.block_grid import BlockGrid
from svite_scale.sparsity.kernels import block_products

LIBRARY = torch.library.Library("svite_scale", "DEF")
LIBRARY.define("expand(Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("compress(Tensor dense, Tensor mask, SymInt num_active) -> Tensor")
LIBRARY.define("active_gradient(Tensor dense, Tensor mask, SymInt num_active, Tensor handle) -> Tensor")
LIBRARY.define("record_gradient(Tensor gradient, Tensor x, Tensor handle, Tensor? attn_mask, bool is_causal) -> ()")
LIBRARY.define("block_product(Tensor x, Tensor values, Tensor mask, Tensor? bias, SymInt[] shape) -> Tensor")
LIBRARY.define("block_transposed_product(Tensor grad, Tensor values, Tensor mask, SymInt[] shape) -> Tensor")
LIBRARY.define("block_active_gradient(Tensor grad, Tensor x, Tensor mask, SymInt[] size, Tensor handle) -> Tensor")
LIBRARY.define("record_weight_gradient(Tensor gradient, Tensor handle) -> ()")
for name in ("active_gradient", "record_gradient", "block_active_gradient", "record_weight_gradient"):
    # A compiled graph then neither removes a call nor joins two that are alike, and keeps their order: hooks are collectives.
    LIBRARY._register_effectful_op(f"svite_scale::{name}", EffectType.ORDERED)
# Not by torch.library.custom_op, whose wrappers would cost each call a third of what the kernels of a small layer take.
expand, compress = torch.ops.svite_scale.expand.default, torch.ops.svite_scale.compress.default
active_gradient = torch.ops.svite_scale.active_gradient.default
record_gradient = torch.ops.svite_scale.record_gradient.default
record_weight_gradient = torch.ops.svite_scale.record_weight_gradient.default
block_product = torch.ops.svite_scale.block_product.default
block_transposed_product = torch.ops.svite_scale.block_transposed_product.default
block_active_gradient = torch.ops.svite_scale.block_active_gradient.default


@torch.library.impl(LIBRARY, "expand", "CompositeExplicitAutograd")
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return kernels.expand(values, mask, torch.Size(shape))


@torch.library.impl(LIBRARY, "compress", "CompositeExplicitAutograd")
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return kernels.compress(dense, mask, num_active)


@torch.library.impl(LIBRARY, "active_gradient", "CompositeExplicitAutograd")
def _(dense: Tensor, mask: Tensor, num_active: int, handle: Tensor) -> Tensor:
    """Returns ``compress(dense, mask, num_active)``, and passes the dense gradient to the layer's hook, if it has one."""
    hook = hooks.hook_of(handle)
    if hook is not None:
        hook(dense.detach())
    return kernels.compress(dense, mask, num_active)


@torch.library.impl(LIBRARY, "record_gradient", "CompositeExplicitAutograd")
@torch.no_grad()
def _(gradient: Tensor, x: Tensor, handle: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Calls the ``record_gradient`` of a layer of units, if the layer has a hook."""
    layer = hooks.layer_of(handle)
    if layer is not None and layer.gradient_hook is not None:
        layer.record_gradient(x, gradient, attn_mask, is_causal)


@torch.library.impl(LIBRARY, "block_product", "CompositeExplicitAutograd")
def _(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return block_products.product(x, values, mask, bias, torch.Size(shape))


@torch.library.impl(LIBRARY, "block_transposed_product", "CompositeExplicitAutograd")
def _(grad: Tensor, values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return block_products.transposed_product(grad, values, mask, torch.Size(shape))


@torch.library.impl(LIBRARY, "block_active_gradient", "CompositeExplicitAutograd")
@torch.no_grad()
def _(grad: Tensor, x: Tensor, mask: Tensor, size: Sequence[int], handle: Tensor) -> Tensor:
    """Returns the active blocks of ``grad.T @ x``. The layer's hook, if it has one, gets all blocks, ``[N, U, V]``."""
    num_active, width, height = size
    hook = hooks.hook_of(handle)
    if hook is None:
        return block_products.active_gradient(grad, x, mask, torch.Size(size))
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    grid = BlockGrid(dense.shape, (height, width))
    hook(grid.to_blocks(dense))
    return block_products.compress(dense, mask, grid, num_active)


@torch.library.impl(LIBRARY, "record_weight_gradient", "CompositeExplicitAutograd")
@torch.no_grad()
def _(gradient: Tensor, handle: Tensor) -> None:
    """Passes the gradient of a dense weight to the layer's hook, if it has one, in blocks, ``[N, U, V]``."""
    layer = hooks.layer_of(handle)
    if layer is not None and layer.gradient_hook is not None:
        layer.gradient_hook(layer.grid.to_blocks(gradient))


@torch.library.register_fake("svite_scale::expand")
def _(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


@torch.library.register_fake("svite_scale::compress")
def _(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    return dense.new_empty(num_active)


@torch.library.register_fake("svite_scale::active_gradient")
def _(dense: Tensor, mask: Tensor, num_active: int, handle: Tensor) -> Tensor:
    return dense.new_empty(num_active)


@torch.library.register_fake("svite_scale::record_gradient")
def _(gradient: Tensor, x: Tensor, handle: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    pass


@torch.library.register_fake("svite_scale::block_product")
def _(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.register_fake("svite_scale::block_transposed_product")
def _(grad: Tensor, values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


@torch.library.register_fake("svite_scale::block_active_gradient")
def _(grad: Tensor, x: Tensor, mask: Tensor, size: Sequence[int], handle: Tensor) -> Tensor:
    return x.new_empty(size)


@torch.library.register_fake("svite_scale::record_weight_gradient")
def _(gradient: Tensor, handle: Tensor) -> None:
    pass


def _one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Returns the rule of vmap for an operator that returns a tensor."""

    def rule(info: Any, in_dims: tuple[Any, ...], *batched: Any) -> tuple[Tensor, int]:
        return torch.stack([operator(*arguments) for arguments in _samples(info.batch_size, in_dims, batched)]), 0

    return rule


def _samples(batch_size: int, in_dims: tuple[Any, ...], batched: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Returns the arguments of an operator for each sample of a batch. Batched tensors have an int in ``in_dims``."""
    columns = (
        argument.unbind(dim) if isinstance(dim, int) else [argument] * batch_size
        for argument, dim in zip(batched, in_dims, strict=True)
    )
    return zip(*columns, strict=True)


def _record_one_by_one(operator: Callable[..., None]) -> Callable[..., tuple[None, None]]:
    """Returns the rule of vmap for an operator that returns nothing."""

    def rule(info: Any, in_dims: tuple[Any, ...], *batched: Any) -> tuple[None, None]:
        for arguments in _samples(info.batch_size, in_dims, batched):
            operator(*arguments)
        return None, None

    return rule


for operator in (expand, compress, active_gradient, block_product, block_transposed_product, block_active_gradient):
    torch.library.register_vmap(operator, _one_by_one(operator))
for operator in (record_gradient, record_weight_gradient):
    torch.library.register_vmap(operator, _record_one_by_one(operator))
