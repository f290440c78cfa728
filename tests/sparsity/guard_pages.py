"""Runs the C kernels on buffers that lie against pages which can't be read or written: a program of test_kernels.py.

Once each buffer ends where such a page begins, once it begins where one ends. An access outside ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch

from svite_scale.sparsity.kernels.cpu_library import load_library
from tests.sparsity.bit_patterns import EDGES, INTEGERS, packed_of

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


def main() -> None:
    library = load_library()
    checked = 0
    for instructions in ["portable"] + ["avx2"] * library.has_avx2():
        for numel in (*EDGES, 1000, 4099):
            for density in (0.0, 0.02, 0.3, 1.0):
                for dtype in (torch.float32, torch.bfloat16):
                    for at_end in (False, True):
                        check(library, instructions, numel, density, dtype, at_end)
                        checked += 1
    print(f"checked {checked}")


if __name__ == "__main__":
    main()
