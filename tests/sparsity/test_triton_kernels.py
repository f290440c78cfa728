"""The Triton kernels: interpreted on the CPU, compiled on a GPU where there is one; what serves where they can't be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svite_scale.sparsity import kernels
from svite_scale.sparsity.kernels import compress, expand, kernels_for, torch_kernels
from tests.sparsity.bit_patterns import assert_same_bits, packed_of

ROOT = Path(__file__).parents[2]


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled Triton kernels need a CUDA GPU")


@pytest.mark.parametrize("way", ["interpreted", pytest.param("compiled", marks=on_a_gpu)])
def test_it_moves_the_right_bits(way: str) -> None:
    pytest.importorskip("triton", reason="torch brings Triton on Linux with x86-64 only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sparsity/interpreted_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if way == "interpreted" else "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 9, 2047, 2049, 100_003])
def test_the_host_never_waits_for_the_gpu(dtype: torch.dtype, numel: int) -> None:
    from svite_scale.sparsity.kernels import triton_kernels

    packed = packed_of(numel, 0.3, dtype, seed=numel)
    dense, mask, values, expanded = (t.cuda() for t in (packed.dense, packed.mask, packed.values, packed.expanded))
    assert kernels_for(values, mask) is triton_kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = expand(values, mask, dense.shape), compress(dense, mask, len(values))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(found[0], expanded)
    assert_same_bits(found[1], values)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="the current GPU can be another one only where there are two")
def test_on_a_gpu_that_isnt_the_current_one() -> None:
    packed = packed_of(5000, 0.3, torch.float32, seed=5)
    dense, mask, values = (tensor.to("cuda:1") for tensor in (packed.dense, packed.mask, packed.values))
    with torch.cuda.device(0):
        found = expand(values, mask, dense.shape), compress(dense, mask, len(values))
    assert [tensor.device.index for tensor in found] == [1, 1]
    assert_same_bits(found[0], packed.expanded.to("cuda:1"))
    assert_same_bits(found[1], values)


@pytest.mark.parametrize("trouble", ["no triton", "no GPU driver"])
def test_where_it_cant_be_used_torch_operations_serve_and_one_warning_says_so(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "no triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "svite_scale.sparsity.kernels.triton_kernels", raising=False)
        monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    elif torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    kernels._cuda.cache_clear()
    with caplog.at_level("WARNING", logger="svite_scale"):
        for _ in range(2):
            assert kernels._cuda(torch.device("cuda", 0)) is torch_kernels
    kernels._cuda.cache_clear()
    (record,) = caplog.records
    assert record.name == "svite_scale"
    assert "can't be used on cuda:0, so slower torch operations take their place" in record.getMessage()
    if trouble == "no triton":
        assert "ModuleNotFoundError: import of triton halted" in record.getMessage()
