"""Runs the C kernels on buffers that lie against pages which can't be read or written: a program of test_kernels.py.

Once each buffer ends where such a page begins, once it begins where one ends. An access outside ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import cpu_block_products
from svite_scale.sparsity.kernels.cpu_block_products import CpuBlockProducts
from svite_scale.sparsity.kernels.cpu_library import load_library
from tests.sparsity.bit_patterns import EDGES, INTEGERS, packed_of
from tests.sparsity.test_block_products import INSTRUCTIONS

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory of some pages with a forbidden one before and after it."""

    def __init__(self, num_bytes: int, at_end: bool) -> None:
        pages = -(-max(num_bytes, 1) // PAGE)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for forbidden in (start, start + (pages + 1) * PAGE):
            assert LIBC.mprotect(ctypes.c_void_p(forbidden), PAGE, 0) == 0
        self.address = start + PAGE + (pages * PAGE - num_bytes if at_end else 0)
        self.num_bytes = num_bytes

    def write(self, data: bytes) -> None:
        ctypes.memmove(self.address, data, self.num_bytes)

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.num_bytes)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(INTEGERS.get(tensor.dtype, tensor.dtype)).numpy().tobytes()


def guarded(tensor: torch.Tensor, at_end: bool) -> Guarded:
    """A copy of a tensor's bytes."""
    data = bytes_of(tensor)
    buffer = Guarded(len(data), at_end)
    buffer.write(data)
    return buffer


def check(library: ctypes.CDLL, instructions: str, numel: int, density: float, dtype: torch.dtype, at_end: bool) -> None:
    packed = packed_of(numel, density, dtype, seed=numel)
    k, size = packed.values.numel(), packed.values.element_size()
    values, mask, dense = (guarded(tensor, at_end) for tensor in (packed.values, packed.mask, packed.dense))
    expand, compress = (function(library, f"{task}_{size}_{instructions}") for task in ("expand", "compress"))
    result = Guarded(numel * size, at_end)
    assert expand(values.address, k, mask.address, result.address, numel) == k
    assert result.read() == bytes_of(packed.expanded)
    result = Guarded(k * size, at_end)
    assert compress(dense.address, numel, mask.address, result.address, k) == k
    assert result.read() == bytes_of(packed.values)
    for due in {k - 1, k + 1, k + 8} & set(range(numel + 8)):
        values, result = Guarded(due * size, at_end), Guarded(numel * size, at_end)
        assert expand(values.address, due, mask.address, result.address, numel) == k
        assert compress(dense.address, numel, mask.address, values.address, due) == k
        assert not np.frombuffer(result.read() + values.read(), dtype=np.uint8).any(), "nothing is written when it's refused"


def function(library: ctypes.CDLL, name: str) -> Any:
    found = library[name]
    found.argtypes = [ctypes.c_void_p if letter == "p" else ctypes.c_int64 for letter in "pippi"]
    found.restype = ctypes.c_int64
    return found


def check_blocks(products: CpuBlockProducts, height: int, width: int, tokens: int, at_end: bool) -> None:
    """Runs the three products of a weight in 3 x 5 blocks, and checks that one with a wrong count writes nothing."""
    generator = torch.Generator().manual_seed(height + width + tokens)
    active = torch.rand(15, generator=generator) < 0.5
    k, rows, columns = int(active.sum()), 3 * height, 5 * width

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    factors = random(tokens, columns), random(tokens, rows), random(k, width, height), random(rows)
    buffers = [guarded(tensor, at_end) for tensor in (*factors, bits.pack(active))]
    x, grad, values, bias, mask = (buffer.address for buffer in buffers)
    sizes = (3, 5, width, height, 2)
    for due in (k + 1, k):
        y, grad_x, gradient = (Guarded(4 * numel, at_end) for numel in (tokens * rows, tokens * columns, k * height * width))
        assert products._product(x, tokens, values, due, mask, bias, y.address, *sizes) == k
        assert products._transposed_product(grad, tokens, values, due, mask, grad_x.address, *sizes) == k
        assert products._active_gradient(grad, x, tokens, mask, gradient.address, due, *sizes) == k
        is_written = [bool(np.frombuffer(buffer.read(), dtype=np.uint8).any()) for buffer in (y, grad_x, gradient)]
        assert is_written == [due == k and tokens > 0] * 3


def main() -> None:
    library = load_library("packed")
    checked = 0
    for instructions in ["portable"] + ["avx2"] * library.has_avx2():
        for numel in (*EDGES, 1000, 4099):
            for density in (0.0, 0.02, 0.3, 1.0):
                for dtype in (torch.float32, torch.bfloat16):
                    for at_end in (False, True):
                        check(library, instructions, numel, density, dtype, at_end)
                        checked += 1
    for name in INSTRUCTIONS:
        products = cpu_block_products.load(name)
        for height, width in ((16, 1), (48, 3), (64, 16)):
            for tokens in (0, 1, 29, 150):
                for at_end in (False, True):
                    check_blocks(products, height, width, tokens, at_end)
                    checked += 1
    print(f"checked {checked}")


if __name__ == "__main__":
    main()
