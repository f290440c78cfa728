"""All Triton kernels compiled, not run, for GPUs that needn't be there: to machine code, by Triton's own assembler."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="torch brings Triton on Linux with x86-64 only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets kernels in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from svite_scale.sparsity.kernels import triton_block_products as blocks  # noqa: E402
from svite_scale.sparsity.kernels import triton_kernels as elements  # noqa: E402

pytestmark = pytest.mark.slow
ARCHITECTURES = [80, 90]
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes that a program may use. 86 runs the code of 80."""
POINTERS = {
    **dict.fromkeys(("starts", "sources", "places", "columns", "rows"), "*i32"),
    **dict.fromkeys(("counts", "ends"), "*i64"),
    "mask": "*u8",
}
"""Types of arguments. Others are int32, or the elements that a test names."""
TILES = [(kernel, tile) for kernel in (blocks._product_kernel, blocks._gradient_kernel) for tile in kernel.configs]


def compile_kernel(
    kernel: Any, architecture: int, elements: dict[str, str], constants: dict[str, Any], tile: Any = None
) -> Any:
    """Compiles a kernel as a launch does whose sizes are multiples of 16 and whose tensors are aligned.

    Args:
        kernel: a function of ``triton.jit``.
        architecture: 10 times the compute capability.
        elements: the types of pointers that are in no other table.
        constants: arguments that are known in advance.
        tile: of ``triton.Config``.
    """
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **POINTERS, **elements, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = [
        (number,) for number, name in enumerate(signature) if signature[name][0] == "*" or name in ("num_inputs", "num_outputs")
    ]
    source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    options = {"enable_fp_fusion": True}
    if tile is not None:
        options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compile_product(
    kernel: Any,
    architecture: int,
    dtype: str,
    block: tuple[int, int],
    tile: Any,
    transposed: bool = False,
    precision: str = "ieee",
) -> Any:
    """Compiles one of the autotuned kernels for blocks of V by U with one of its tiles."""
    outer, inner = block[::-1] if transposed else block
    constants = {"inner": inner, "outer": outer, "precision": precision, "tile_outer": blocks._tile_outer(outer), **tile.kwargs}
    if kernel is blocks._product_kernel:
        constants["bias" if transposed else "places"] = None
    types = dict.fromkeys(("inputs", "values", "bias", "outputs", "grads"), f"*{dtype}")
    return compile_kernel(kernel.fn, architecture, types, constants, tile)


def assert_built(compiled: Any) -> None:
    assert compiled.asm["cubin"][:4] == b"\x7fELF"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "tile"), TILES)
def test_each_tile_reads_16_bytes_at_a_time_into_the_shared_memory_there_is(architecture: int, kernel: Any, tile: Any) -> None:
    compiled = compile_product(kernel, architecture, "bf16", (128, 32), tile)
    assert_built(compiled)
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]
    code = compiled.asm["ptx"]
    assert code.count("cp.async.cg.shared.global") >= 8
    assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [blocks._product_kernel, blocks._gradient_kernel])
@pytest.mark.parametrize(("dtype", "block"), [("bf16", (128, 64)), ("fp16", (48, 16)), ("fp32", (128, 64))])
def test_the_first_tile_suits_every_gpu(architecture: int, dtype: str, kernel: Any, block: tuple[int, int]) -> None:
    for transposed in (False, True) if kernel is blocks._product_kernel else (False,):
        compiled = compile_product(kernel, architecture, dtype, block, kernel.configs[0], transposed)
        assert_built(compiled)
        assert compiled.metadata.shared <= min(SHARED_MEMORY.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [blocks._product_kernel, blocks._gradient_kernel])
def test_tf32_uses_tensor_cores(architecture: int, kernel: Any) -> None:
    compiled = compile_product(kernel, architecture, "fp32", (128, 64), kernel.configs[0], precision="tf32")
    assert_built(compiled)
    assert compiled.metadata.shared <= min(SHARED_MEMORY.values())
    assert "tf32" in compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("single", [(), ("num_rows",), ("num_columns",), ("num_rows", "num_columns", "num_active")])
def test_the_index_kernels_compile(architecture: int, single: tuple[str, ...]) -> None:
    """A launch makes a constant of an argument that is 1."""
    ones = dict.fromkeys(single, 1)
    assert_built(
        compile_kernel(blocks._row_index_kernel, architecture, {}, {"tile": blocks.INDEX_TILE, "tile_columns": 32} | ones)
    )
    assert_built(compile_kernel(blocks._column_index_kernel, architecture, {}, {"tile_rows": 64, "tile_columns": 32} | ones))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("integers", ["*i16", "*i32"])
def test_the_kernels_of_single_weights_compile(architecture: int, integers: str) -> None:
    types = dict.fromkeys(("values", "dense"), integers)
    for kernel in (elements._count_kernel, elements._expand_kernel, elements._compress_kernel):
        assert_built(compile_kernel(kernel, architecture, types, {"block": elements.BLOCK}))
