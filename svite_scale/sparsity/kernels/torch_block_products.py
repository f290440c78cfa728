"""The products with blocks in calls to BLAS: one matrix product of reduced length for each row of blocks.

Inputs are transposed once, to [features, tokens], so that the columns that a row of blocks needs are gathered as whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svite_scale.sparsity import bits


def product(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.block_products.product`; for CPU tensors."""
    columns = x.t().contiguous()
    result = x.new_zeros(shape[0], len(x))  # a row of blocks may have no active one
    for rows, chosen, weight in _rows_of_blocks(values, mask, shape):
        torch.mm(weight.t(), columns[chosen], out=result[rows])
    result = result.t().contiguous()
    return result if bias is None else result.add_(bias)


def transposed_product(grad: Tensor, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.block_products.transposed_product`; for CPU tensors."""
    columns = grad.t().contiguous()
    # Summed in fp32 at least, as a dense product does inside.
    result = grad.new_zeros(shape[1], len(grad), dtype=torch.promote_types(grad.dtype, torch.float32))
    for rows, chosen, weight in _rows_of_blocks(values, mask, shape):
        result.index_add_(0, chosen, (weight @ columns[rows]).to(result.dtype))
    return result.t().to(grad.dtype).contiguous()


def active_gradient(grad: Tensor, x: Tensor, mask: Tensor, size: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.block_products.active_gradient`; for CPU tensors."""
    columns = x.t().contiguous()
    result = x.new_empty(size)
    shape = torch.Size([grad.shape[1], x.shape[1]])
    for rows, chosen, block in _rows_of_blocks(result, mask, shape):
        torch.mm(columns[chosen], grad[:, rows], out=block)
    return result


def _rows_of_blocks(values: Tensor, mask: Tensor, shape: torch.Size) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields each row of blocks that has active ones.

    Args:
        values: ``[k, U, V]``.
        mask: uint8 ``[ceil(N / 8)]``.
        shape: rows and columns of the weight.

    Yields:
        Its V rows of the weight; the active columns of the weight in it, int64 ``[n * U]``; and their values, a view
        ``[n * U, V]``.
    """
    num_active, width, height = values.shape
    num_rows, num_columns = shape[0] // height, shape[1] // width
    active = bits.unpack(mask, num_rows * num_columns).view(num_rows, num_columns)
    counts = active.sum(dim=1).tolist()
    bits.check_count(sum(counts), num_active)
    offsets = torch.arange(width)
    start = 0
    for row, count in enumerate(counts):
        if count:
            chosen = active[row].nonzero() * width + offsets
            block = values[start : start + count].view(count * width, height)
            yield slice(row * height, (row + 1) * height), chosen.flatten(), block
        start += count
