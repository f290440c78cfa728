"""The two differentiable products with a packed weight.

A packed weight of N elements with k active ones is ``values`` (float ``[k]``, ascending flat position) and ``mask`` (uint8
``[ceil(N / 8)]``). The dense weight exists only inside a forward or a backward of its layer: autograd keeps ``values`` and
``mask``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from svite_scale.sparsity.kernels import compress, expand
from svite_scale.sparsity.sparse_layer import GradientSink


class PackedLinearProduct(Function):
    """``F.linear`` on a packed weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size, sink: GradientSink | None
    ) -> Tensor:
        ctx.save_for_backward(x, values, mask)
        ctx.shape, ctx.sink = shape, sink
        return F.linear(x, expand(values.to(x.dtype), mask, shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ expand(values.to(grad.dtype), mask, ctx.shape)
        rows = torch.atleast_2d(grad).flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_values = _packed_gradient(rows.t() @ torch.atleast_2d(x).flatten(0, -2), values, mask, ctx.sink)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_values, None, grad_bias, None, None


@dataclass(frozen=True)
class Convolution:
    """The hyper-parameters of a 2-D convolution with zero padding."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class PackedConv2dProduct(Function):
    """``F.conv2d`` on a packed weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        convolution: Convolution,
        sink: GradientSink | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, mask)
        ctx.shape, ctx.convolution, ctx.sink = shape, convolution, sink
        weight = expand(values.to(x.dtype), mask, shape)
        return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), **vars(convolution))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        options = vars(ctx.convolution)
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = expand(values.to(grad.dtype), mask, ctx.shape)
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, **options)
        if ctx.needs_input_grad[1]:
            dense = torch.nn.grad.conv2d_weight(x, ctx.shape, grad, **options)
            grad_values = _packed_gradient(dense, values, mask, ctx.sink)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_values, None, grad_bias, None, None, None


def _packed_gradient(dense: Tensor, values: Tensor, mask: Tensor, sink: GradientSink | None) -> Tensor:
    """Shows the dense gradient to the sink, then keeps its active elements."""
    if sink is not None:
        sink(dense)
    return compress(dense, mask, values.numel()).to(values.dtype)
