"""Expansion of packed weights to dense ones and back, by the fastest path for a tensor's device and dtype.

A packed weight of N elements with k active ones is ``values`` (float ``[k]``, ascending flat position) and ``mask`` (uint8
``[ceil(N / 8)]``). All paths give the same bits: elements are moved, never computed with. Neither function is differentiable;
the products of :mod:`svite_scale.sparsity.layers.packed` are.

- CPU, fp32, bf16 and fp16: C, compiled at the first use.
- CUDA, the same dtypes: Triton.
- Anything else: torch operations. So too where a fast path isn't available, which is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import cpu_kernels, torch_kernels
from svite_scale.sparsity.kernels.cpu_library import BuildError
from svite_scale.sparsity.mask import Mask

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, nn.Parameter, Mask)
"""Types of tensors that have memory of their own."""
LOG = logging.getLogger("svite_scale")
Path = TypeVar("Path")


class Kernels(Protocol):
    """One path."""

    def expand(self, values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor: ...

    def compress(self, dense: Tensor, mask: Tensor, num_active: int) -> Tensor: ...


def is_traced(tensor: Tensor) -> bool:
    """Returns whether ``torch.compile`` or ``torch.func`` follows what is computed: a tensor then has no numbers to look at."""
    # torch has no public way to ask for torch.func.
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@torch.no_grad()
def expand(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """Returns the dense weight.

    Args:
        values: float, ``[k]``.
        mask: uint8, ``[ceil(N / 8)]`` with k bits set, on the same device. Bits past N mean nothing.
        shape: shape of the dense weight, N elements.

    Returns:
        Like ``values``, of ``shape``; 0 where inactive.

    Raises:
        ValueError: the mask isn't of N positions or on another device, or, on the CPU, k of them aren't active. (On an
            accelerator that count would make the host wait: with Triton, values that are missing are 0 and extra ones ignored.)
    """
    bits.check_size(mask, shape.numel())
    return kernels_for(values, mask).expand(values, mask, shape)


@torch.no_grad()
def compress(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    """Returns the active elements of a dense tensor.

    Args:
        dense: N elements of any shape.
        mask: uint8, ``[ceil(N / 8)]`` with k bits set, on the same device. Bits past N mean nothing.
        num_active: k.

    Returns:
        Like ``dense``, ``[k]``, in ascending flat position.

    Raises:
        ValueError: the mask isn't of N positions or on another device, or, on the CPU, ``num_active`` of them aren't active.
    """
    bits.check_size(mask, dense.numel())
    return kernels_for(dense, mask).compress(dense, mask, num_active)


def kernels_for(elements: Tensor, mask: Tensor) -> Kernels:
    """Returns the path of a call with these tensors: torch's for subclasses, which may have no memory, and in compiled graphs.

    Raises:
        ValueError: they are on different devices.
    """
    device = elements.device
    if mask.device != device:
        raise ValueError(f"the mask is on {mask.device}, the elements on {device}")
    has_memory = all(type(tensor) in PLAIN for tensor in (elements, mask))
    if has_memory and elements.dtype in FAST_DTYPES and not torch.compiler.is_compiling():
        if device.type == "cpu":
            return _cpu()
        if device.type == "cuda":
            return _cuda(device)
    return torch_kernels


@cache
def _cpu() -> Kernels:
    return compiled_path(cpu_kernels.load, "packed weights") or torch_kernels


@cache
def _cuda(device: torch.device) -> Kernels:
    path = triton_path("triton_kernels", device, "packed weights", "slower torch operations take their place")
    return cast(Kernels, path or torch_kernels)


def compiled_path(load: Callable[[], Path], what: str) -> Path | None:
    """Returns the CPU kernels that ``load`` compiles and loads; None, with a warning, where they can't be compiled.

    Args:
        load: raises BuildError or OSError then.
        what: they are kernels of.
    """
    try:
        return load()
    except (BuildError, OSError) as error:
        LOG.warning(
            "The CPU kernels of %s can't be compiled, so slower torch operations take their place. "
            "Install a C compiler (gcc or clang) or name one in CC. The reason: %s",
            what,
            error,
        )
        return None


def triton_path(module: str, device: torch.device, what: str, consequence: str) -> ModuleType | None:
    """Returns a module of Triton kernels, tried out on a device; None, with a warning, where they can't be used.

    Args:
        module: its name in this folder.
        device: of type cuda.
        what: they are kernels of.
        consequence: of doing without them.
    """
    try:
        path = import_module(f"{__name__}.{module}")
        path.try_out(device)
    except Exception as error:  # whatever Triton, its compiler or its driver raises
        LOG.warning(
            "The Triton kernels of %s can't be used on %s, so %s. "
            "Install the triton that this torch was released with, and a C compiler. The reason: %s: %s",
            what,
            device,
            consequence,
            type(error).__name__,
            error,
        )
        return None
    return path
