"""The two differentiable products with a packed weight, and the differentiable dense weight itself.

A packed weight of N elements with k active ones is ``values`` (float ``[k]``, ascending flat position) and ``mask`` (uint8
``[ceil(N / 8)]``). In the products the dense weight exists only inside a forward or a backward of its layer: autograd keeps
``values`` and ``mask``. All three can be differentiated again, and by ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor
from torch.autograd.function import Function

from svite_scale.sparsity.kernels.operators import compress, expand
from svite_scale.sparsity.layers.base import GradientSink


def with_signature(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remembers a function's signature, which ``Function.apply`` asks for, and which takes long to find, at each call."""
    function.__signature__ = signature(function)  # type: ignore[attr-defined]  # as PEP 362 has it
    return function


class DenseRead(Function):
    """The dense weight, 0 where inactive."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(values: Tensor, mask: Tensor, shape: torch.Size, sink: GradientSink | None) -> Tensor:
        return expand(values, mask, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, mask, _, ctx.sink = inputs
        ctx.save_for_backward(values, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, mask = ctx.saved_tensors
        return _packed_gradient(gradient, values, mask, ctx.sink), None, None, None


class ActiveRead(Function):
    """The active elements of a dense tensor, ``[k]``: the inverse of :class:`DenseRead`, and its gradient."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
        return compress(dense, mask, num_active)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, mask, _ = inputs
        ctx.save_for_backward(mask)
        ctx.shape = dense.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return read_dense(gradient, mask, ctx.shape), None, None


def read_dense(values: Tensor, mask: Tensor, shape: torch.Size, sink: GradientSink | None = None) -> Tensor:
    """The dense weight of ``shape``. Its gradient goes to ``values`` where active, and whole to the sink."""
    if not torch.is_grad_enabled():  # in a backward, where a function of autograd would only take time
        return expand(values, mask, shape)
    return cast(Tensor, DenseRead.apply(values, mask, shape, sink))


class PackedLinearProduct(Function):
    """``F.linear`` on a packed weight."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size, sink: GradientSink | None
    ) -> Tensor:
        return F.linear(x, expand(values.to(x.dtype), mask, shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, mask, _, ctx.shape, ctx.sink = inputs
        ctx.save_for_backward(x, values, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ read_dense(values.to(grad.dtype), mask, ctx.shape, ctx.sink)
        rows = torch.atleast_2d(grad).flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_values = _packed_gradient(rows.t() @ torch.atleast_2d(x).flatten(0, -2), values, mask, ctx.sink)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_values, None, grad_bias, None, None


class PackedConv2dProduct(Function):
    """``F.conv2d`` on a packed weight, of a batch, with ``stride``, ``padding``, ``dilation`` and ``groups`` in ``options``."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        values: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        options: dict[str, Any],
        sink: GradientSink | None,
    ) -> Tensor:
        weight = expand(values.to(x.dtype), mask, shape)
        return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, mask, _, ctx.shape, ctx.options, ctx.sink = inputs
        ctx.save_for_backward(x, values, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = read_dense(values.to(grad.dtype), mask, ctx.shape, ctx.sink)
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, **ctx.options)
        if ctx.needs_input_grad[1]:
            dense = torch.nn.grad.conv2d_weight(x, ctx.shape, grad, **ctx.options)
            grad_values = _packed_gradient(dense, values, mask, ctx.sink)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_values, None, grad_bias, None, None, None


def _packed_gradient(dense: Tensor, values: Tensor, mask: Tensor, sink: GradientSink | None) -> Tensor:
    """Shows the dense gradient to the sink, then keeps its active elements."""
    if sink is not None:
        sink(dense.detach())
    if not torch.is_grad_enabled():
        return compress(dense, mask, values.numel()).to(values.dtype)
    return cast(Tensor, ActiveRead.apply(dense, mask, values.numel())).to(values.dtype)
