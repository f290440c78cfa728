"""Layers whose weights are active or inactive in blocks, and the products with their active blocks.

A weight of R rows and C columns in blocks of V rows by U columns has N blocks, of which k are active: ``values`` (float
``[k, U, V]``, along a row of blocks first) and ``mask`` (uint8 ``[ceil(N / 8)]``). The products multiply active blocks only, so
their time falls with density; the dense gradient is computed in growth windows only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from svite_scale.sparsity import bits
from svite_scale.sparsity.block_grid import BlockGrid
from svite_scale.sparsity.kernels import block_products
from svite_scale.sparsity.kernels.operators import (
    block_active_gradient,
    block_product,
    block_transposed_product,
    record_gradient,
)
from svite_scale.sparsity.layers.base import LayerContext, UnitParameter, with_signature
from svite_scale.sparsity.layers.packed import PackedConv2d, PackedLayer, PackedLinear


class BlockLayer(PackedLayer):
    """A packed layer whose units are blocks of its weight.

    Attributes:
        values: trainable float parameter, ``[num_active, U, V]``; its own shape an engine may hide.
        shape: of the grid of blocks, N elements.
    """

    unit = "blocks"

    @property
    def value_shape(self) -> tuple[int, ...]:
        height, width = self.grid.block
        return width, height

    def fan_in_factor(self) -> Tensor:
        """Returns the root of the layer's inputs over the active ones of a block's own row of blocks, fp32 ``[k, 1, 1]``."""
        active = bits.unpack(self.mask, self.grid.num_blocks).view(self.grid.grid)
        of_rows = active.float().mean(dim=1).rsqrt()
        return of_rows[active.nonzero()[:, 0]].view(-1, 1, 1)

    def read_dense(self, values: Tensor, mask: Tensor) -> Tensor:
        dense = block_products.expand(values.view(-1, *self.value_shape), mask, self.grid)
        return cast(Tensor, RecordedWeight.apply(dense, self.handle)) if torch.is_grad_enabled() else dense

    def record_gradient(self, gradient: Tensor, *inputs: Tensor) -> None:
        super().record_gradient(self.grid.to_blocks(gradient))

    @torch.no_grad()
    def take_active(self, dense: Tensor) -> None:
        self.values.copy_(block_products.compress(dense, self.mask, self.grid, self.num_active))

    def num_multiplied(self, device: torch.device) -> int:
        size = torch.Size([self.num_active, *self.value_shape])
        return self.num_active if block_products.is_sized(size, device, self.values.dtype) else self.grid.num_blocks

    def unit_parameters(self) -> dict[str, UnitParameter]:
        return {"values": UnitParameter(self.values, row_numel=self.grid.block_numel)}

    def importance(self, context: LayerContext) -> Tensor:
        """Returns the L2 norm of each active block, 0 where inactive."""
        norms = context.read(self.values).view(self.num_active, -1).norm(dim=1)
        active = bits.unpack(context.mask, self.grid.num_blocks)
        return norms.new_zeros(self.grid.num_blocks).masked_scatter_(active, norms)

    def growth_scores(self, context: LayerContext) -> Tensor:
        """Returns the L2 norm of each block of the dense gradient."""
        return context.gather().view(self.grid.num_blocks, -1).norm(dim=1)

    def multiply(self, x: Tensor) -> Tensor:
        """Returns the product of ``[..., C]`` with the weight, as a matrix, plus bias: ``[..., R]``."""
        x = x.to(self._product_dtype(x))
        values = self.values.view(-1, *self.value_shape).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return cast(Tensor, BlockProduct.apply(x, values, self.mask, bias, self.grid, self.handle))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={list(self.grid.block)}"


class BlockLinear(BlockLayer, PackedLinear):  # type: ignore[misc]  # bias may be None
    """``nn.Linear`` with a weight in blocks: ``[..., in_features]`` to ``[..., out_features]``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class BlockConv2d(BlockLayer, PackedConv2d):  # type: ignore[misc]  # bias may be None
    """``nn.Conv2d`` of patches that don't overlap, with a weight in blocks: the product of each patch with a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        height, width = self.kernel_size
        rows, columns = x.shape[-2] // height, x.shape[-1] // width
        if not rows or not columns:
            raise ValueError(f"{self.name}: an input of {x.shape[-2]} x {x.shape[-1]} is smaller than the kernel")
        patches = x[..., : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
        return self.multiply(patches.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


def is_matrix(layer: nn.Linear | nn.Conv2d) -> bool:
    """Returns whether a layer is the product of its inputs, or of patches that don't overlap, with a matrix."""
    if isinstance(layer, nn.Linear):
        return True
    return (
        layer.stride == layer.kernel_size
        and layer.padding in ((0, 0), "valid")
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )


class BlockProduct(Function):
    """``x @ W.T + bias`` for a weight in blocks."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, grid: BlockGrid, handle: Tensor | None) -> Tensor:
        return block_product(x, values, mask, bias, grid.matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, mask, _, ctx.grid, handle = inputs
        ctx.save_for_backward(x, values, mask, handle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask, handle = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = TransposedProduct.apply(grad, values, mask, ctx.grid, handle)
        if ctx.needs_input_grad[1]:
            grad_values = ActiveGradient.apply(grad, x, mask, ctx.grid, len(values), handle)
        if ctx.needs_input_grad[3]:
            grad_bias = torch.atleast_2d(grad).flatten(0, -2).sum(dim=0)
        return grad_x, grad_values, None, grad_bias, None, None


class TransposedProduct(Function):
    """``grad @ W`` for a weight in blocks."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(grad: Tensor, values: Tensor, mask: Tensor, grid: BlockGrid, handle: Tensor | None) -> Tensor:
        return block_transposed_product(grad, values, mask, grid.matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, values, mask, ctx.grid, handle = inputs
        ctx.save_for_backward(grad, values, mask, handle)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        grad, values, mask, handle = ctx.saved_tensors
        grad_grad = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_grad = BlockProduct.apply(grad_x, values, mask, None, ctx.grid, handle)
        if ctx.needs_input_grad[1]:
            grad_values = ActiveGradient.apply(grad, grad_x, mask, ctx.grid, len(values), handle)
        return grad_grad, grad_values, None, None, None


class ActiveGradient(Function):
    """The active blocks of ``grad.T @ x``, ``[k, U, V]``; where a layer's handle is given, its hook gets all of it."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(grad: Tensor, x: Tensor, mask: Tensor, grid: BlockGrid, num_active: int, handle: Tensor | None) -> Tensor:
        height, width = grid.block
        return block_active_gradient(grad, x, mask, [num_active, width, height], handle)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, mask, ctx.grid, *_ = inputs
        ctx.save_for_backward(grad, x, mask)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, mask = ctx.saved_tensors
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = BlockProduct.apply(x, grad_values, mask, None, ctx.grid, None)
        if ctx.needs_input_grad[1]:
            grad_x = TransposedProduct.apply(grad, grad_values, mask, ctx.grid, None)
        return grad_grad, grad_x, None, None, None, None


class RecordedWeight(Function):
    """A dense weight; its gradient is given to the layer's hook too, if the layer has one."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(dense: Tensor, handle: Tensor) -> Tensor:
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, handle = inputs
        ctx.save_for_backward(handle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        record_gradient(gradient.detach(), None, None, handle)
        return gradient, None
