"""The products with blocks on CUDA: Triton kernels for blocks whose sides are multiples of 16.

The n active blocks of a row of blocks lie one after another in ``values`` ``[k, U, V]``. So they are a matrix ``[n * U, V]``.
Each program multiplies at the size of what is active:

- ``x @ W.T``: for a tile of tokens and a row of blocks, it sums over the n * U columns of x that this row needs.
- ``grad @ W``: the same kernel takes a column of blocks in place of the row. The blocks of a column are scattered in
  ``values``; an index has the place of each.
- The gradient of the active blocks: for a tile of a row's matrix, it sums over tokens.

Tiles join small blocks of a row. Before each product, a small kernel makes the index from the mask, on the device. So the host
never waits. Dots run on tensor cores and add in fp32. With fp32 inputs they are exact, unless torch allows TF32.

Nothing outside the tensors is touched. If the mask has more than k active blocks, the first k count. If it has fewer, the rest
of ``values`` isn't used, and the rest of a gradient is undefined.

When a product meets a new shape of block, Triton times tiles of several sizes. It keeps its choice on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.block_grid import BlockGrid
from svite_scale.sparsity.kernels.triton_kernels import load_active

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_OUTPUTS = 128
"""The most elements of the outer side of a block that one program takes."""
MOST_TOKENS = 4096
"""Products of more tokens use the tiles that were chosen for these."""
MOST_PROGRAMS = 512
"""A gradient of few tiles splits its sum over tokens, into no more programs than these. The number doesn't depend on the GPU,
so the order of the sums doesn't either."""
LEAST_TOKENS = 512
"""The fewest tokens of one part of a split sum."""
INDEX_TILE = 2048
"""Bits of a mask that a program reads together."""


def product(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.block_products.product`; for CUDA tensors of :data:`DTYPES`."""
    num_active, width, height = values.shape
    y = x.new_empty(len(x), shape[0])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        starts, columns = _index_rows(mask, shape[0] // height, shape[1] // width, num_active)
        _multiply(x, values, bias, starts, columns, None, y, inner=width, outer=height)
    return y


def transposed_product(grad: Tensor, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.block_products.transposed_product`; for CUDA tensors of :data:`DTYPES`."""
    num_active, width, height = values.shape
    dx = grad.new_empty(len(grad), shape[1])
    with torch.cuda.device_of(grad):
        starts, rows, places = _index_columns(mask, shape[0] // height, shape[1] // width, num_active)
        _multiply(grad, values, None, starts, rows, places, dx, inner=height, outer=width)
    return dx


def active_gradient(grad: Tensor, x: Tensor, mask: Tensor, size: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.block_products.active_gradient`; for CUDA tensors of :data:`DTYPES`."""
    num_active, width, height = size
    num_rows, num_columns = grad.shape[1] // height, x.shape[1] // width
    tile_outer = _tile_outer(height)
    num_parts = _num_parts(len(x), triton.cdiv(size.numel(), 64 * tile_outer))
    sums = x.new_empty(num_parts, *size, dtype=x.dtype if num_parts == 1 else torch.float32)

    def grid(tiles: Mapping[str, int]) -> tuple[int, int, int]:
        most_tiles = triton.cdiv(num_columns * width, tiles["tile_inner"])  # of a row whose blocks are all active
        return most_tiles * triton.cdiv(height, tile_outer), num_rows, num_parts

    with torch.cuda.device_of(x):
        starts, columns = _index_rows(mask, num_rows, num_columns, num_active)
        _gradient_kernel[grid](
            grad, x, starts, columns, sums, len(x), triton.cdiv(len(x), num_parts), grad.shape[1], x.shape[1], size.numel(),
            _token_class(len(x)),
            inner=width, outer=height, precision=_precision(), tile_outer=tile_outer, enable_fp_fusion=True,
        )  # fmt: skip
    return sums[0] if num_parts == 1 else sums.sum(0).to(x.dtype)


def try_out(device: torch.device) -> None:
    """Compiles and runs each kernel once for each dtype, on integers, whose sums are exact.

    Raises:
        RuntimeError: they give something else than the reference.
        Exception: whatever Triton raises where it can't compile or launch.
    """
    active = torch.tensor([True, False, True, True, False, True])  # 3 rows of 2 blocks
    side, shape, size = 16, torch.Size([48, 32]), torch.Size([4, 16, 16])
    x, grad, values, bias = (
        (torch.arange(math.prod(sides)) * 7 % 5 - 2.0).view(sides)
        for sides in ((side, shape[1]), (side, shape[0]), size, (shape[0],))
    )
    grid = BlockGrid(shape, (side, side))
    weight = grid.to_weight(torch.zeros(6, side, side).masked_scatter(active.view(6, 1, 1), values))
    expected = (x @ weight.t() + bias, grad @ weight, grid.to_blocks(grad.t() @ x)[active])
    mask = bits.pack(active).to(device)
    for dtype in DTYPES:
        x_, grad_, values_, bias_ = (tensor.to(device, dtype) for tensor in (x, grad, values, bias))
        found = (
            product(x_, values_, mask, bias_, shape),
            transposed_product(grad_, values_, mask, shape),
            active_gradient(grad_, x_, mask, size),
        )
        if not all(torch.equal(a.float().cpu(), b) for a, b in zip(found, expected, strict=True)):
            raise RuntimeError(f"wrong result for {dtype}")


def _multiply(
    inputs: Tensor,
    values: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    sources: Tensor,
    places: Tensor | None,
    outputs: Tensor,
    inner: int,
    outer: int,
) -> None:
    """Writes the product of ``inputs`` with blocks into ``outputs``.

    Args:
        inputs: ``[tokens, C]``, or ``[tokens, R]`` for the transposed product.
        values: ``[k, U, V]``.
        bias: as long as an output, or None.
        starts, sources, places: the index; see :func:`_product_kernel`.
        outputs: ``[tokens, R]`` or ``[tokens, C]``.
        inner: the side of a block along the inputs.
        outer: the side of a block along the outputs.
    """
    (num_tokens, num_inputs), num_outputs = inputs.shape, outputs.shape[1]
    if not num_tokens:
        return
    tile_outer = _tile_outer(outer)

    def grid(tiles: Mapping[str, int]) -> tuple[int, int]:
        # Programs of the same tokens are neighbours, so that they find them in the cache.
        return num_outputs // outer * triton.cdiv(outer, tile_outer), triton.cdiv(num_tokens, tiles["tile_tokens"])

    _product_kernel[grid](
        inputs, values, bias, starts, sources, places, outputs, num_tokens, num_inputs, num_outputs, _token_class(num_tokens),
        inner=inner, outer=outer, precision=_precision(), tile_outer=tile_outer, enable_fp_fusion=True,
    )  # fmt: skip


def _tile_outer(outer: int) -> int:
    return min(triton.next_power_of_2(outer), MOST_OUTPUTS)


def _token_class(num_tokens: int) -> int:
    """Returns the number of tokens that tiles are chosen for: one of few, since each costs a choice."""
    return min(triton.next_power_of_2(max(num_tokens, 1)), MOST_TOKENS)


def _num_parts(num_tokens: int, num_tiles: int) -> int:
    """Returns into how many parts a gradient's sum over tokens is split."""
    return max(1, min(MOST_PROGRAMS // max(num_tiles, 1), num_tokens // LEAST_TOKENS))


def _precision() -> str:
    """Returns how fp32 is multiplied, as torch multiplies it. Reading ``allow_tf32`` fails after some ways to set it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _index_rows(mask: Tensor, num_rows: int, num_columns: int, num_active: int) -> tuple[Tensor, Tensor]:
    """Returns where each row of blocks starts in the values, int32 ``[G + 1]``, and the column of each block, int32 ``[k]``."""
    bits.check_size(mask, num_rows * num_columns)
    starts, columns = (torch.empty(length, dtype=torch.int32, device=mask.device) for length in (num_rows + 1, num_active))
    _row_index_kernel[(num_rows,)](
        mask, starts, columns, num_rows, num_columns, num_active,
        tile=INDEX_TILE, tile_columns=triton.next_power_of_2(num_columns),
    )  # fmt: skip
    return starts, columns


def _index_columns(mask: Tensor, num_rows: int, num_columns: int, num_active: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the index of the active blocks in the order of their columns.

    Returns:
        Where each column of blocks starts in this order, int32 ``[J + 1]``; the row of each block, and its place in the values,
        int32 ``[k]`` both.
    """
    bits.check_size(mask, num_rows * num_columns)
    starts, rows, places = (
        torch.empty(length, dtype=torch.int32, device=mask.device) for length in (num_columns + 1, num_active, num_active)
    )
    tile_columns = triton.next_power_of_2(num_columns)
    _column_index_kernel[(num_columns,)](
        mask, starts, rows, places, num_rows, num_columns, num_active,
        tile_rows=max(INDEX_TILE // tile_columns, 1), tile_columns=tile_columns,
    )  # fmt: skip
    return starts, rows, places


@triton.jit
def _row_index_kernel(  # type: ignore[no-untyped-def]
    mask, starts, columns, num_rows, num_columns, num_active, tile: tl.constexpr, tile_columns: tl.constexpr
):
    """Writes the index of one row of blocks."""
    row = tl.program_id(0)
    first = row * num_columns
    before = 0
    for position in range(0, first, tile):
        positions = position + tl.arange(0, tile)
        before += tl.sum(load_active(mask, positions, positions < first), 0)
    column = tl.arange(0, tile_columns)
    active = load_active(mask, first + column, column < num_columns)
    place = before + tl.cumsum(active, 0) - active
    tl.store(columns + place, column, mask=(active != 0) & (place < num_active))
    tl.store(starts + row, tl.minimum(before, num_active))
    if row == num_rows - 1:
        tl.store(starts + num_rows, tl.minimum(before + tl.sum(active, 0), num_active))


@triton.jit
def _column_index_kernel(  # type: ignore[no-untyped-def]
    mask, starts, rows, places, num_rows, num_columns, num_active, tile_rows: tl.constexpr, tile_columns: tl.constexpr
):
    """Writes the index of one column of blocks."""
    column = tl.program_id(0)
    columns = tl.arange(0, tile_columns)[None, :]
    before = 0  # the blocks of columns to the left
    above = 0  # the blocks of rows above the tile
    for row in range(0, num_rows, tile_rows):
        active, _ = _load_tile(mask, row, above, num_rows, num_columns, num_active, tile_rows, tile_columns)
        before += tl.sum(tl.where(columns < column, active, 0))
        above += tl.sum(active)
    tl.store(starts + column, before)
    above = 0
    for row in range(0, num_rows, tile_rows):
        active, place = _load_tile(mask, row, above, num_rows, num_columns, num_active, tile_rows, tile_columns)
        above += tl.sum(active)
        active = tl.sum(tl.where(columns == column, active, 0), 1)
        place = tl.sum(tl.where(columns == column, place, 0), 1)
        order = before + tl.cumsum(active, 0) - active
        tl.store(rows + order, row + tl.arange(0, tile_rows), mask=active != 0)
        tl.store(places + order, place, mask=active != 0)
        before += tl.sum(active)
    if column == num_columns - 1:
        tl.store(starts + num_columns, before)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    mask, row, above, num_rows, num_columns, num_active, tile_rows: tl.constexpr, tile_columns: tl.constexpr
):
    """Returns 1 for each active block of the rows from ``row`` on, else 0, and its place in the values; int32 matrices."""
    row, column = row + tl.arange(0, tile_rows)[:, None], tl.arange(0, tile_columns)[None, :]
    active = load_active(mask, row * num_columns + column, (row < num_rows) & (column < num_columns))
    in_row = tl.sum(active, 1)
    place = above + (tl.cumsum(in_row, 0) - in_row)[:, None] + tl.cumsum(active, 1) - active
    return tl.where(place < num_active, active, 0), place


def _tiles(*choices: tuple[int, int, int, int]) -> list[triton.Config]:
    """Returns tiles of so many tokens and inner elements, each with a number of warps and of stages."""
    return [
        triton.Config({"tile_tokens": tokens, "tile_inner": inner}, num_warps=warps, num_stages=stages)
        for tokens, inner, warps, stages in choices
    ]


def _suitable(tiles: list[triton.Config], arguments: dict[str, Any], precision: str, **_: Any) -> list[triton.Config]:
    """Returns the tiles to time: the first, and those that the tokens fill. Exact fp32 has registers for the first only."""
    if precision == "ieee" and arguments["inputs"].dtype == torch.float32:
        return tiles[:1]
    return tiles[:1] + [tile for tile in tiles[1:] if tile.kwargs["tile_tokens"] <= arguments["token_class"]]


TUNING: dict[str, Any] = {
    "key": ["token_class", "inner", "outer", "precision"],
    "prune_configs_by": {"early_config_prune": _suitable},
    "cache_results": True,
}


# Half of the stages read the index ahead, the others the inputs and values. Triton leaves out a tile that doesn't fit a GPU.
@triton.autotune(
    _tiles((64, 32, 4, 6), (128, 32, 4, 6), (128, 64, 4, 6), (128, 64, 8, 6), (256, 32, 8, 6), (256, 64, 8, 6)), **TUNING
)
@triton.jit(do_not_specialize=["num_tokens", "token_class"])
def _product_kernel(  # type: ignore[no-untyped-def]
    inputs, values, bias, starts, sources, places, outputs, num_tokens, num_inputs, num_outputs, token_class,
    inner: tl.constexpr, outer: tl.constexpr, precision: tl.constexpr,
    tile_outer: tl.constexpr, tile_tokens: tl.constexpr, tile_inner: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of a tile of tokens for one row of blocks (or column, in the transposed product), or a part of it.

    The blocks of row i have the numbers from ``starts[i]`` to ``starts[i + 1]``. Block b reads the inputs from
    ``sources[b] * inner`` on. It is ``values[places[b]]``, or without places ``values[b]``. Only the choice of tiles needs
    ``token_class``.
    """
    parts: tl.constexpr = (outer + tile_outer - 1) // tile_outer
    block = tl.program_id(0) // parts
    n = tl.program_id(0) % parts * tile_outer + tl.arange(0, tile_outer)
    tokens = tl.program_id(1) * tile_tokens + tl.arange(0, tile_tokens)
    has_token, has_n = (tokens < num_tokens)[:, None], (n < outer)[None, :]
    tokens = tokens.to(tl.int64)[:, None]
    first = tl.load(starts + block)
    length = (tl.load(starts + block + 1) - first) * inner
    sums = tl.zeros((tile_tokens, tile_outer), tl.float32)
    if bias is not None:
        sums += tl.load(bias + block * outer + n, mask=n < outer, other=0).to(tl.float32)[None, :]
    for start in range(0, length, tile_inner):
        k = start + tl.arange(0, tile_inner)
        has_k = k < length
        number = first + k // inner
        source = tl.load(sources + number, mask=has_k, other=0)
        columns = _in_runs(source * inner + k % inner)
        x = tl.load(inputs + tokens * num_inputs + columns[None, :], mask=has_token & has_k[None, :], other=0)
        if places is None:
            offsets = (first * inner + k)[:, None] * outer + n[None, :]
        else:
            place = tl.load(places + number, mask=has_k, other=0)
            offsets = _in_runs(place * (inner * outer) + k % inner)[:, None] + n[None, :] * inner
        weight = tl.load(values + offsets, mask=has_k[:, None] & has_n, other=0)
        sums = tl.dot(x, weight, sums, input_precision=precision)
    offsets = tokens * num_outputs + (block * outer + n)[None, :]
    tl.store(outputs + offsets, sums.to(outputs.dtype.element_ty), mask=has_token & has_n)


@triton.autotune(_tiles((32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 8, 3)), **TUNING)
@triton.jit(do_not_specialize=["num_tokens", "part_tokens", "token_class"])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    grads, inputs, starts, columns, outputs, num_tokens, part_tokens, num_outputs, num_inputs, numel, token_class,
    inner: tl.constexpr, outer: tl.constexpr, precision: tl.constexpr,
    tile_outer: tl.constexpr, tile_tokens: tl.constexpr, tile_inner: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the matrix ``[n * U, V]`` of a row of blocks: the sum over one part of the tokens."""
    parts: tl.constexpr = (outer + tile_outer - 1) // tile_outer
    row, part = tl.program_id(1), tl.program_id(2)
    start = tl.program_id(0) // parts * tile_inner
    first = tl.load(starts + row)
    length = (tl.load(starts + row + 1) - first) * inner
    if start < length:
        k = start + tl.arange(0, tile_inner)
        n = tl.program_id(0) % parts * tile_outer + tl.arange(0, tile_outer)
        has_k, has_n = k < length, (n < outer)[None, :]
        column = tl.load(columns + first + k // inner, mask=has_k, other=0)
        in_x, in_grad = _in_runs(column * inner + k % inner)[None, :], (row * outer + n)[None, :]
        sums = tl.zeros((tile_inner, tile_outer), tl.float32)
        end = tl.minimum((part + 1) * part_tokens, num_tokens)
        for token in range(part * part_tokens, end, tile_tokens):
            tokens = token + tl.arange(0, tile_tokens)
            has_token = (tokens < end)[:, None]
            tokens = tokens.to(tl.int64)[:, None]
            x = tl.load(inputs + tokens * num_inputs + in_x, mask=has_token & has_k[None, :], other=0)
            grad = tl.load(grads + tokens * num_outputs + in_grad, mask=has_token & has_n, other=0)
            sums = tl.dot(tl.trans(x), grad, sums, input_precision=precision)
        offsets = part.to(tl.int64) * numel + (first * inner + k)[:, None] * outer + n[None, :]
        tl.store(outputs + offsets, sums.to(outputs.dtype.element_ty), mask=has_k[:, None] & has_n)


@triton.jit
def _in_runs(offsets):  # type: ignore[no-untyped-def]
    """Returns the offsets. Tells the compiler that they are runs of 16 from multiples of 16: it then reads 16 bytes at once."""
    return tl.max_contiguous(tl.multiple_of(offsets, 16), 16)
