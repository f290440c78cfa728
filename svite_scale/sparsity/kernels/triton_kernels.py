"""The CUDA path: Triton kernels.

A program takes ``BLOCK`` positions. Where its values begin is an exclusive prefix sum of the active positions of the blocks
before it: one kernel counts them by block, torch sums them up, a second kernel moves the elements. The host never waits.
Elements are moved as integers of their size, so that a NaN keeps its payload.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import torch_kernels

BLOCK = 2048
"""Positions of one program; a power of 2, at least 8."""
INTEGERS = {2: torch.int16, 4: torch.int32}
"""By size of an element."""


def expand(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.expand`; for elements of 2 or 4 bytes."""
    dense = values.new_empty(shape)
    numel, num_active = dense.numel(), values.numel()
    if not numel:
        return dense
    with torch.cuda.device_of(mask):  # Triton launches on the current device
        counts, ends = _count_blocks(mask, numel)
        source, target = _as_integers(values), _as_integers(dense)
        _expand_kernel[(len(counts),)](source, mask.contiguous(), counts, ends, target, numel, num_active, block=BLOCK)
    return dense


def compress(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.compress`; for elements of 2 or 4 bytes.

    On a count that doesn't match, values that don't fit are dropped, and values without an element are left undefined.
    """
    numel = dense.numel()
    if not numel:
        return dense.new_empty(0)
    with torch.cuda.device_of(mask):
        counts, ends = _count_blocks(mask, numel)
        values = dense.new_empty(num_active)
        source, target = _as_integers(dense), _as_integers(values)
        _compress_kernel[(len(counts),)](source, mask.contiguous(), counts, ends, target, numel, num_active, block=BLOCK)
    return values


def try_out(device: torch.device) -> None:
    """Compiles and runs the kernels once for each size of element.

    Raises:
        RuntimeError: they give something else than the reference.
        Exception: whatever Triton raises where it can't compile or launch.
    """
    active = torch.arange(2 * BLOCK + 3, device=device) % 3 == 0
    mask, count = bits.pack(active), -(-active.numel() // 3)
    for dtype in (torch.float32, torch.float16):
        dense = torch.arange(1, active.numel() + 1, device=device).to(dtype)
        values = compress(dense, mask, count)
        expanded = expand(values, mask, dense.shape)
        expected = torch_kernels.compress(dense, mask, count)
        if not torch.equal(values, expected) or not torch.equal(expanded, torch_kernels.expand(expected, mask, dense.shape)):
            raise RuntimeError(f"wrong result for {dtype}")


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def _count_blocks(mask: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Returns the active positions of each block, and of it and all before it; int64, to be summed without a cast."""
    counts = torch.empty(triton.cdiv(numel, BLOCK), dtype=torch.int64, device=mask.device)
    _count_kernel[(len(counts),)](mask.contiguous(), counts, numel, block=BLOCK)
    return counts, counts.cumsum(dim=0)


@triton.jit
def _block_positions(numel, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns this program's positions, int64 ``[block]``, and which of them there are."""
    positions = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return positions, positions < numel


@triton.jit
def load_active(mask, positions, exists):  # type: ignore[no-untyped-def]
    """Returns 1 where a position exists and is active, else 0; int32."""
    byte = tl.load(mask + positions // 8, mask=exists, other=0).to(tl.int32)
    return (byte >> (positions % 8).to(tl.int32)) & 1


@triton.jit
def _value_positions(active, counts, ends):  # type: ignore[no-untyped-def]
    """Returns the place of each active position among the values, int64."""
    before = tl.load(ends + tl.program_id(0)) - tl.load(counts + tl.program_id(0))
    return before + tl.cumsum(active, 0) - active


@triton.jit
def _count_kernel(mask, counts, numel, block: tl.constexpr):  # type: ignore[no-untyped-def]
    positions, exists = _block_positions(numel, block)
    tl.store(counts + tl.program_id(0), tl.sum(load_active(mask, positions, exists), 0).to(tl.int64))


@triton.jit
def _expand_kernel(values, mask, counts, ends, dense, numel, num_active, block: tl.constexpr):  # type: ignore[no-untyped-def]
    positions, exists = _block_positions(numel, block)
    active = load_active(mask, positions, exists)
    sources = _value_positions(active, counts, ends)
    elements = tl.load(values + sources, mask=(active != 0) & (sources < num_active), other=0)
    tl.store(dense + positions, elements, mask=exists)


@triton.jit
def _compress_kernel(dense, mask, counts, ends, values, numel, num_active, block: tl.constexpr):  # type: ignore[no-untyped-def]
    positions, exists = _block_positions(numel, block)
    active = load_active(mask, positions, exists)
    targets = _value_positions(active, counts, ends)
    elements = tl.load(dense + positions, mask=active != 0, other=0)
    tl.store(values + targets, elements, mask=(active != 0) & (targets < num_active))
