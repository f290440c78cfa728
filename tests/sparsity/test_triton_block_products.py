"""The Triton kernels of blocks: interpreted on the CPU, compiled on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import block_products
from svite_scale.sparsity.layers.packed import PackedLayer
from tests.sparsity.packing import twin_of

ROOT = Path(__file__).parents[2]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled Triton kernels need a CUDA GPU")


@pytest.mark.parametrize("way", ["interpreted", pytest.param("compiled", marks=on_a_gpu)])
def test_products_are_those_of_the_dense_weight(way: str) -> None:
    pytest.importorskip("triton", reason="torch brings Triton on Linux with x86-64 only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sparsity/interpreted_block_products.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if way == "interpreted" else "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_host_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    active = torch.arange(12 * 24) % 3 == 0
    mask, shape = bits.pack(active).cuda(), torch.Size([12 * 64, 24 * 32])
    values = torch.randn(96, 32, 64, device="cuda", dtype=dtype)
    x, bias = torch.randn(2000, shape[1], device="cuda", dtype=dtype), torch.zeros(shape[0], device="cuda", dtype=dtype)
    assert block_products._path(values.shape, values.device, dtype) is not block_products.DENSE
    for mode in ("default", "error"):  # the first time, tiles are timed
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = block_products.product(x, values, mask, bias, shape)
            block_products.transposed_product(y, values, mask, shape)
            block_products.active_gradient(y, x, mask, values.shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("block", [(16, 16), (32, 48), (96, 16)])
def test_a_layer_computes_on_a_gpu_what_it_computes_on_a_cpu(block: tuple[int, int]) -> None:
    layer = twin_of(nn.Linear(96, 192), block=block).packed
    x = torch.randn(2, 197, 96)
    results = [compute(layer.to(device), x.to(device)) for device in ("cpu", "cuda")]
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-3)


def compute(layer: PackedLayer, x: Tensor) -> tuple[Tensor, ...]:
    """Returns a layer's output, and the gradients of its input, values and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.values, layer.bias])


@pytest.mark.parametrize(
    ("block", "dtype", "expected"),
    [
        ((16, 16), torch.float32, True),
        ((48, 32), torch.bfloat16, True),
        ((16, 16), torch.float64, False),
        ((8, 16), torch.float32, False),
        ((16, 8), torch.float16, False),
        ((24, 16), torch.float32, False),
    ],
)
def test_products_are_sized_where_both_sides_are_multiples_of_16(
    block: tuple[int, int], dtype: torch.dtype, expected: bool
) -> None:
    height, width = block
    assert block_products.is_sized(torch.Size([5, width, height]), torch.device("cuda"), dtype) == expected


@pytest.mark.parametrize(("setting", "expected"), [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")])
def test_fp32_is_multiplied_as_torch_is_set_to(setting: str, expected: str) -> None:
    triton_products = pytest.importorskip("svite_scale.sparsity.kernels.triton_block_products")
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert triton_products._precision() == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("trouble", ["no triton", "no GPU driver"])
def test_where_it_cant_be_used_products_are_dense_and_one_warning_says_so(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "no triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "svite_scale.sparsity.kernels.triton_block_products", raising=False)
        monkeypatch.delattr("svite_scale.sparsity.kernels.triton_block_products", raising=False)
    elif torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    block_products._cuda.cache_clear()
    with caplog.at_level("WARNING", logger="svite_scale"):
        for dtype in (torch.float32, torch.bfloat16):
            path = block_products._path(torch.Size([5, 16, 32]), torch.device("cuda", 0), dtype)
            assert path is block_products.DENSE
    block_products._cuda.cache_clear()
    (record,) = caplog.records
    assert "can't be used on cuda:0, so weights in blocks take the time of dense ones" in record.getMessage()
    if trouble == "no triton":
        assert "ModuleNotFoundError" in record.getMessage()
