"""The Triton kernels of blocks: interpreted on the CPU, compiled on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import block_products

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
    assert block_products.is_sized(values.shape, values.device, dtype)
    for mode in ("default", "error"):  # the first time, tiles are timed
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = block_products.product(x, values, mask, bias, shape)
            block_products.transposed_product(y, values, mask, shape)
            block_products.active_gradient(y, x, mask, values.shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("block", [(8, 16), (16, 8), (24, 16)])
def test_other_blocks_are_multiplied_dense(block: tuple[int, int]) -> None:
    height, width = block
    assert not block_products.is_sized(torch.Size([5, width, height]), torch.device("cuda", 0), torch.bfloat16)


@pytest.mark.parametrize("trouble", ["no triton", "no GPU driver"])
def test_where_it_cant_be_used_products_are_dense_and_one_warning_says_so(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "no triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "svite_scale.sparsity.kernels.triton_block_products", raising=False)
    elif torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.delattr("svite_scale.sparsity.kernels.triton_block_products", raising=False)
    block_products._cuda.cache_clear()
    with caplog.at_level("WARNING", logger="svite_scale"):
        for dtype in (torch.float32, torch.bfloat16):
            assert not block_products.is_sized(torch.Size([5, 16, 32]), torch.device("cuda", 0), dtype)
    block_products._cuda.cache_clear()
    (record,) = caplog.records
    assert "can't be used on cuda:0, so weights in blocks take the time of dense ones" in record.getMessage()
    if trouble == "no triton":
        assert "ModuleNotFoundError" in record.getMessage()
