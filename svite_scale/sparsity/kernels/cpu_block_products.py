"""The products with blocks on a CPU, called through ctypes: blocks.c, for blocks of V a multiple of 16. It multiplies in fp32,
so inputs of fewer bits are converted, and the results back.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import FAST_DTYPES, LOG, PLAIN
from svite_scale.sparsity.kernels.cpu_library import BuildError, c_function, load_library

ROWS_MULTIPLE = 16
"""V is a multiple of it."""
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""The compiler's flags, by torch's name for a processor's instructions. Others get none: code for any processor."""


class CpuBlockProducts:
    """The compiled products.

    Args:
        library: blocks.c as :func:`~svite_scale.sparsity.kernels.cpu_library.load_library` returns it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number = ctypes.c_void_p, ctypes.c_int64
        # In the order of blocks.c: inputs, outputs and the five numbers of _sizes.
        factors, sizes = (address, number, address, number, address), (number,) * 5
        of_gradient = (address, address, number, address, address, number)
        self._product = c_function(library, "block_product", number, *factors, address, address, *sizes)
        self._transposed_product = c_function(library, "block_transposed_product", number, *factors, address, *sizes)
        self._active_gradient = c_function(library, "block_active_gradient", number, *of_gradient, *sizes)

    def product(self, x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
        """See :func:`svite_scale.sparsity.kernels.block_products.product`; on the CPU, for V a multiple of 16."""
        sizes = _sizes(shape, values.shape, mask)
        tokens, num_active = len(x), len(values)
        dtype, x, values, bias = x.dtype, _fp32(x), _fp32(values), None if bias is None else _fp32(bias)
        y = x.new_empty(tokens, shape[0])
        factors = _address(x, tokens, shape[1]), tokens, _address(values, *values.shape), num_active, mask.data_ptr()
        bias_address = None if bias is None else _address(bias, shape[0])
        _check_result(self._product(*factors, bias_address, y.data_ptr(), *sizes), num_active)
        return y.to(dtype)

    def transposed_product(self, grad: Tensor, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
        """See :func:`svite_scale.sparsity.kernels.block_products.transposed_product`; like :meth:`product`."""
        sizes = _sizes(shape, values.shape, mask)
        tokens, num_active = len(grad), len(values)
        dtype, grad, values = grad.dtype, _fp32(grad), _fp32(values)
        grad_x = grad.new_empty(tokens, shape[1])
        factors = _address(grad, tokens, shape[0]), tokens, _address(values, *values.shape), num_active, mask.data_ptr()
        _check_result(self._transposed_product(*factors, grad_x.data_ptr(), *sizes), num_active)
        return grad_x.to(dtype)

    def active_gradient(self, grad: Tensor, x: Tensor, mask: Tensor, size: torch.Size) -> Tensor:
        """See :func:`svite_scale.sparsity.kernels.block_products.active_gradient`; like :meth:`product`."""
        rows, columns = grad.shape[1], x.shape[1]
        sizes = _sizes(torch.Size([rows, columns]), size, mask)
        tokens, num_active = len(x), size[0]
        dtype, grad, x = x.dtype, _fp32(grad), _fp32(x)
        gradient = x.new_empty(size)
        factors = _address(grad, tokens, rows), _address(x, tokens, columns), tokens, mask.data_ptr()
        _check_result(self._active_gradient(*factors, gradient.data_ptr(), num_active, *sizes), num_active)
        return gradient.to(dtype)


def load(instructions: str | None = None) -> CpuBlockProducts:
    """Loads the products for this processor, or for the instructions that ``FLAGS`` has by this name.

    Raises:
        BuildError: the library can't be built.
        OSError: it can't be written or loaded.
    """
    flags = FLAGS.get(instructions or torch.backends.cpu.get_cpu_capability(), ())
    try:
        library = load_library("blocks", *flags, "-fopenmp")  # its threads are torch's, which has loaded OpenMP before
    except (BuildError, OSError) as error:
        library = load_library("blocks", *flags)
        LOG.warning(
            "The CPU kernels of weights in blocks can't be compiled with OpenMP, so they use one thread. Install gcc, or "
            "name it in CC. The reason: %s",
            error,
        )
    return CpuBlockProducts(library)


def _sizes(shape: torch.Size, values_shape: torch.Size, mask: Tensor) -> tuple[int, ...]:
    """Returns the last arguments of each function: rows and columns of blocks, U, V and the number of threads."""
    _, width, height = values_shape
    rows, columns = shape[0] // height, shape[1] // width
    if height % ROWS_MULTIPLE or (rows * height, columns * width) != tuple(shape):
        raise ValueError(f"a weight of shape {list(shape)} can't be multiplied in blocks of {height} x {width}")
    bits.check_size(mask, rows * columns)
    return rows, columns, width, height, torch.get_num_threads()


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in FAST_DTYPES else tensor


def _address(tensor: Tensor, *shape: int) -> int:
    """Returns where a tensor's elements are.

    Raises:
        ValueError: it isn't of ``shape``, fp32 and contiguous, or it has no memory of its own.
    """
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous() or type(tensor) not in PLAIN:
        raise ValueError(
            f"expected a contiguous fp32 tensor of shape {list(shape)}, not {list(tensor.shape)} {tensor.dtype} "
            f"({type(tensor).__name__})"
        )
    return tensor.data_ptr()


def _check_result(found: int, num_active: int) -> None:
    if found < 0:
        raise MemoryError("no memory for a product with a weight in blocks")
    bits.check_count(found, num_active)
