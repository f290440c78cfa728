"""The CPU path: packed.c on elements of 2 and 4 bytes, called through ctypes on the tensors' own memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels.cpu_library import c_function, load_library


class CpuKernels:
    """The compiled kernels.

    Args:
        library: what :func:`~svite_scale.sparsity.kernels.cpu_library.load_library` returns.
        instructions: ``"avx2"`` or ``"portable"``; the former only where the processor has it.
    """

    def __init__(self, library: ctypes.CDLL, instructions: str) -> None:
        address, number = ctypes.c_void_p, ctypes.c_int64
        self._expand, self._compress = (
            {
                size: c_function(library, f"{task}_{size}_{instructions}", number, address, number, address, address, number)
                for size in (2, 4)
            }
            for task in ("expand", "compress")
        )

    def expand(self, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
        """See :func:`svite_scale.sparsity.kernels.expand`; for CPU tensors with elements of 2 or 4 bytes."""
        values, mask = values.contiguous(), mask.contiguous()
        dense = values.new_empty(shape)
        found = self._expand[values.element_size()](
            values.data_ptr(), values.numel(), mask.data_ptr(), dense.data_ptr(), dense.numel()
        )
        bits.check_count(found, values.numel())
        return dense

    def compress(self, dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
        """See :func:`svite_scale.sparsity.kernels.compress`; for CPU tensors with elements of 2 or 4 bytes."""
        dense, mask = dense.contiguous(), mask.contiguous()
        values = dense.new_empty(num_active)
        found = self._compress[dense.element_size()](
            dense.data_ptr(), dense.numel(), mask.data_ptr(), values.data_ptr(), num_active
        )
        bits.check_count(found, num_active)
        return values


def load() -> CpuKernels:
    """Loads the kernels for this processor.

    Raises:
        BuildError: the library can't be built.
        OSError: it can't be written or loaded.
    """
    library = load_library("packed")
    return CpuKernels(library, "avx2" if library.has_avx2() else "portable")
