"""Every path on the CPU against NumPy, bit by bit; which path a tensor takes; what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from svite_scale.sparsity import kernels
from svite_scale.sparsity.kernels import Kernels, compress, expand, kernels_for, torch_kernels
from svite_scale.sparsity.kernels.cpu_kernels import CpuKernels
from svite_scale.sparsity.kernels.cpu_library import load_library
from tests.sparsity.bit_patterns import Packed, assert_same_bits, packed_of, packed_weights

ROOT = Path(__file__).parents[2]
PATHS = ["torch", "portable", "avx2", "dispatched"]


def path_named(name: str) -> Kernels:
    if name == "dispatched":
        return kernels
    if name == "torch":
        return torch_kernels
    library = load_library("packed")
    if name == "avx2" and not library.has_avx2():
        pytest.skip("this processor has no AVX2")
    return CpuKernels(library, name)


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> Kernels:
    return path_named(request.param)


@given(packed=packed_weights())
def test_each_path_moves_the_bits_that_numpy_moves(path: Kernels, packed: Packed) -> None:
    assert_same_bits(path.expand(packed.values, packed.mask, packed.dense.shape), packed.expanded)
    assert_same_bits(path.compress(packed.dense, packed.mask, packed.values.numel()), packed.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_as_large_as_a_layers(path: Kernels, dtype: torch.dtype) -> None:
    packed = packed_of(384 * 385, 0.3, dtype, seed=1)
    assert_same_bits(path.expand(packed.values, packed.mask, torch.Size((384, 385))), packed.expanded.view(384, 385))
    assert_same_bits(path.compress(packed.dense.view(385, 384), packed.mask, packed.values.numel()), packed.values)


@pytest.mark.parametrize("numel", [1, 9, 513])
def test_float64_moves_the_same_bits(numel: int) -> None:
    packed = packed_of(numel, 0.4, torch.float64, seed=4)
    assert_same_bits(expand(packed.values, packed.mask, packed.dense.shape), packed.expanded)
    assert_same_bits(compress(packed.dense, packed.mask, packed.values.numel()), packed.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_need_be_contiguous_or_aligned(path: Kernels, dtype: torch.dtype) -> None:
    packed = packed_of(35, 0.4, dtype, seed=2)
    dense = packed.dense.view(7, 5).t().contiguous().t()
    mask, values = (torch.stack([tensor, tensor], dim=1)[:, 1] for tensor in (packed.mask, packed.values))
    assert not dense.is_contiguous()
    assert not mask.is_contiguous()
    assert_same_bits(path.expand(values, mask, torch.Size((7, 5))), packed.expanded.view(7, 5))
    assert_same_bits(path.compress(dense, mask, values.numel()), packed.values)
    odd_values, odd_mask = (torch.cat([tensor[:1], tensor])[1:] for tensor in (packed.values, packed.mask))
    assert_same_bits(path.expand(odd_values, odd_mask, torch.Size((35,))), packed.expanded)


@pytest.mark.parametrize("difference", [-1, 1, 40])
@pytest.mark.parametrize("numel", [1, 9, 77, 800])
def test_a_mask_of_another_count_is_refused(path: Kernels, numel: int, difference: int) -> None:
    packed = packed_of(numel, 1.0, torch.float32, seed=3)
    found, due = numel, numel + difference
    with pytest.raises(ValueError, match=rf"^the mask has {found} active positions, not {due}$"):
        path.expand(torch.zeros(due), packed.mask, packed.dense.shape)
    with pytest.raises(ValueError, match=rf"^the mask has {found} active positions, not {due}$"):
        path.compress(packed.dense, packed.mask, due)


def test_an_empty_weight(path: Kernels) -> None:
    none, no_mask = torch.empty(0), torch.empty(0, dtype=torch.uint8)
    assert path.expand(none, no_mask, torch.Size((0, 3))).shape == (0, 3)
    assert path.compress(torch.empty(0, 3), no_mask, 0).shape == (0,)


class Subclass(Tensor):
    pass


def test_the_path_goes_by_device_dtype_and_kind() -> None:
    mask = torch.zeros(1, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert isinstance(kernels_for(torch.zeros(3, dtype=dtype), mask), CpuKernels)
        assert isinstance(kernels_for(nn.Parameter(torch.zeros(3, dtype=dtype)), mask), CpuKernels)
    assert kernels_for(torch.zeros(3, dtype=torch.float64), mask) is torch_kernels
    assert kernels_for(torch.zeros(3, device="meta"), mask.to("meta")) is torch_kernels
    assert kernels_for(torch.zeros(3).as_subclass(Subclass), mask) is torch_kernels
    assert kernels_for(torch.zeros(3), mask.as_subclass(Subclass)) is torch_kernels


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_mask_that_cant_belong_is_refused(device: str) -> None:
    values, dense = torch.zeros(3, device=device), torch.zeros(17, device=device)
    for wrong in (torch.zeros(2, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int8)):
        with pytest.raises(ValueError, match="17 positions need 3 uint8"):
            expand(values, wrong.to(device), dense.shape)
        with pytest.raises(ValueError, match="17 positions need 3 uint8"):
            compress(dense, wrong.to(device), 3)
    elsewhere = torch.zeros(3, dtype=torch.uint8, device="cpu" if device == "meta" else "meta")
    with pytest.raises(ValueError, match=f"the mask is on {elsewhere.device}, the elements on {device}"):
        expand(values, elsewhere, dense.shape)
    with pytest.raises(ValueError, match=f"the mask is on {elsewhere.device}, the elements on {device}"):
        compress(dense, elsewhere, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_meta_device_has_shapes(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, dtype=torch.uint8, device="meta")
    dense = expand(torch.zeros(4, dtype=dtype, device="meta"), mask, torch.Size((3, 4)))
    assert (dense.shape, dense.dtype, dense.is_meta) == ((3, 4), dtype, True)
    values = compress(dense, mask, 4)
    assert (values.shape, values.dtype, values.is_meta) == ((4,), dtype, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_is_differentiable_on_any_path(dtype: torch.dtype) -> None:
    mask = torch.tensor([0b101], dtype=torch.uint8)
    assert not expand(torch.ones(2, dtype=dtype, requires_grad=True), mask, torch.Size((3,))).requires_grad
    assert not compress(torch.ones(3, dtype=dtype, requires_grad=True), mask, 2).requires_grad


def test_nothing_outside_the_buffers_is_touched() -> None:
    """In a process of its own, which an access outside them kills."""
    done = subprocess.run([sys.executable, "-m", "tests.sparsity.guard_pages"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout.startswith("checked ")
