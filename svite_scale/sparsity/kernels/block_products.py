"""Products with a weight that is stored as its active blocks, by the fastest path for a tensor's device and dtype.

A weight of ``shape`` [R, C] in blocks of V rows by U columns is ``values``, float ``[k, U, V]``, the k active blocks along a
row of blocks first, and ``mask``, uint8 ``[ceil(N / 8)]``, a bit for each of the N blocks. Each of the three products is linear
in both of its factors, and the derivatives of each are the other two. They multiply active blocks only:

- CPU, fp32, bf16 and fp16, V a multiple of 16: C, compiled at the first use, which multiplies in fp32.
- CPU, otherwise, V of 128 or more: BLAS, one product of reduced length for each row of blocks.
- CUDA, fp32, bf16 and fp16, U and V multiples of 16: Triton.
- Anything else: the weight is expanded and multiplied dense, which takes less time than BLAS does for such small blocks.

Where C can't be compiled, or Triton can't be used, the next path takes its place, which is logged once.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.block_grid import BlockGrid
from svite_scale.sparsity.kernels import (
    FAST_DTYPES,
    compiled_path,
    cpu_block_products,
    is_traced,
    torch_block_products,
    triton_path,
)

BLAS_ROWS = 128
"""V below which one dense product is faster than many of reduced length."""
TENSOR_CORE_SIDE = 16
"""U and V are multiples of it in Triton's products."""


class BlockProducts(Protocol):
    """One path. Inputs are contiguous matrices, ``[tokens, R]`` or ``[tokens, C]``."""

    def product(self, x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor: ...

    def transposed_product(self, grad: Tensor, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor: ...

    def active_gradient(self, grad: Tensor, x: Tensor, mask: Tensor, size: torch.Size) -> Tensor: ...


@torch.no_grad()
def product(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
    """Returns ``x @ W.T + bias``, ``[..., R]``.

    Args:
        x: ``[..., C]``.
        values: ``[k, U, V]``, of the dtype of ``x``.
        mask: uint8 ``[ceil(N / 8)]`` with k bits set, on the same device.
        bias: ``[R]``, or None.
        shape: R and C.

    Raises:
        ValueError: ``x`` has another number of features, the mask isn't of N blocks, or, on the CPU, k of them aren't active.
    """
    matrix, bias = _matrix(x, shape[1]), None if bias is None else bias.contiguous()
    result = _path(values.shape, x.device, x.dtype).product(matrix, values.contiguous(), mask.contiguous(), bias, shape)
    return _like_input(result, x)


@torch.no_grad()
def transposed_product(grad: Tensor, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """Returns ``grad @ W``, ``[..., C]``, for ``grad`` ``[..., R]``; see :func:`product`."""
    matrix = _matrix(grad, shape[0])
    result = _path(values.shape, grad.device, grad.dtype).transposed_product(
        matrix, values.contiguous(), mask.contiguous(), shape
    )
    return _like_input(result, grad)


@torch.no_grad()
def active_gradient(grad: Tensor, x: Tensor, mask: Tensor, size: torch.Size) -> Tensor:
    """Returns the active blocks of ``grad.T @ x``, of ``size`` [k, U, V], for ``grad`` ``[..., R]`` and ``x`` ``[..., C]``; see
    :func:`product`.
    """
    grad, x = _matrix(grad, grad.shape[-1]), _matrix(x, x.shape[-1])
    return _path(size, x.device, x.dtype).active_gradient(grad, x, mask.contiguous(), size)


def expand(values: Tensor, mask: Tensor, grid: BlockGrid) -> Tensor:
    """Returns the dense weight of a grid, 0 where inactive. Differentiable, on any device; the host doesn't wait for it."""
    active = _active_blocks(mask, grid, len(values))
    source = (active.cumsum(0) - 1).clamp(min=0, max=len(values) - 1)
    return grid.to_weight(torch.where(active.view(-1, 1, 1), values[source], 0.0))


def compress(dense: Tensor, mask: Tensor, grid: BlockGrid, num_active: int) -> Tensor:
    """Returns the active blocks of a dense weight, ``[k, U, V]``; see :func:`expand`."""
    active = _active_blocks(mask, grid, num_active)
    return grid.to_blocks(dense)[torch.nonzero_static(active, size=num_active).squeeze(1)]


def _active_blocks(mask: Tensor, grid: BlockGrid, num_active: int) -> Tensor:
    """Returns bool ``[N]``; checks the count on the CPU only, where nobody waits for it, and not in graphs and transforms."""
    active = bits.unpack(mask, grid.num_blocks)
    if active.device.type == "cpu" and not is_traced(active):
        bits.check_count(int(active.count_nonzero()), num_active)
    return active


class DenseProducts:
    """The path of small blocks: the weight is dense for the time of a product."""

    def product(self, x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
        return F.linear(x, expand(values, mask, _grid(shape, values.shape)), bias)

    def transposed_product(self, grad: Tensor, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
        return grad @ expand(values, mask, _grid(shape, values.shape))

    def active_gradient(self, grad: Tensor, x: Tensor, mask: Tensor, size: torch.Size) -> Tensor:
        dense = grad.t() @ x
        return compress(dense, mask, _grid(dense.shape, size), size[0])


def is_sized(values_shape: torch.Size, device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether a device has products at the size of what is active for blocks of this shape, ``[k, U, V]``."""
    _, width, height = values_shape
    if device.type == "cuda":
        return dtype in FAST_DTYPES and width % TENSOR_CORE_SIDE == height % TENSOR_CORE_SIDE == 0
    return device.type == "cpu" and (_fits_c(values_shape, dtype) or height >= BLAS_ROWS)


def _path(values_shape: torch.Size, device: torch.device, dtype: torch.dtype) -> BlockProducts:
    if not is_sized(values_shape, device, dtype):
        return DENSE
    if device.type == "cuda":
        return _cuda(device)
    compiled = _cpu() if _fits_c(values_shape, dtype) else None
    return compiled or (torch_block_products if values_shape[2] >= BLAS_ROWS else DENSE)


def _fits_c(values_shape: torch.Size, dtype: torch.dtype) -> bool:
    return dtype in FAST_DTYPES and values_shape[2] % cpu_block_products.ROWS_MULTIPLE == 0


@cache
def _cpu() -> BlockProducts | None:
    return compiled_path(cpu_block_products.load, "weights in blocks")


@cache
def _cuda(device: torch.device) -> BlockProducts:
    path = triton_path("triton_block_products", device, "blocks", "weights in blocks take the time of dense ones")
    return cast(BlockProducts, path or DENSE)


DENSE = DenseProducts()


def _matrix(x: Tensor, num_features: int) -> Tensor:
    if x.shape[-1:] != (num_features,):
        raise ValueError(f"an input of shape {tuple(x.shape)} doesn't have the {num_features} features of the weight")
    return x.reshape(-1, num_features).contiguous()


def _like_input(result: Tensor, x: Tensor) -> Tensor:
    """Returns a product with the leading dimensions of its input; no view, so that what follows may change it in place."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(result, [*x.shape[:-1], result.shape[-1]]))


def _grid(shape: torch.Size, values_shape: torch.Size) -> BlockGrid:
    return BlockGrid(shape, (values_shape[2], values_shape[1]))
