"""The products with weights in blocks on the CPU, by each path, against a dense weight in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import block_products, cpu_block_products, torch_block_products
from svite_scale.sparsity.kernels.block_products import BlockProducts
from svite_scale.sparsity.kernels.cpu_block_products import CpuBlockProducts

ROWS, COLUMNS = 3, 5
"""Of blocks."""
AVAILABLE = {"AVX512": ["AVX512", "AVX2", "none"], "AVX2": ["AVX2", "none"]}
INSTRUCTIONS = AVAILABLE.get(torch.backends.cpu.get_cpu_capability(), ["none"])
TOKENS = [0, 1, 13, 14, 29, 197]
"""Around the tokens of a tile, and more than a chunk of them."""


@dataclass
class Case:
    """One weight in float64, dense and as its active blocks, and factors for its products."""

    active: Tensor
    values: Tensor
    weight: Tensor
    bias: Tensor
    x: Tensor
    grad: Tensor

    @property
    def mask(self) -> Tensor:
        return bits.pack(self.active)


def case(height: int, width: int, tokens: int, active: Tensor, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).double()  # exact in fp32

    values = draw(int(active.sum()), width, height)
    weight = torch.zeros(ROWS * height, COLUMNS * width, dtype=torch.float64)
    index = 0
    for block in range(ROWS * COLUMNS):
        if active[block]:
            row, column = block // COLUMNS * height, block % COLUMNS * width
            weight[row : row + height, column : column + width] = values[index].t()
            index += 1
    return Case(active, values, weight, draw(len(weight)), draw(tokens, weight.shape[1]), draw(tokens, len(weight)))


def masks() -> Iterator[Tensor]:
    """None active, all, and some with an empty row of blocks, a full one and an empty column of blocks."""
    yield torch.zeros(ROWS * COLUMNS, dtype=torch.bool)
    yield torch.ones(ROWS * COLUMNS, dtype=torch.bool)
    some = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    some[1], some[2, 1], some[2, 3] = True, True, True
    some[:, 2] = False
    yield some.flatten()


def assert_near(found: Tensor, expected: Tensor, magnitudes: Tensor, length: int) -> None:
    """Checks each element of a sum of ``length`` products, by the bound of its rounding errors; 0 bounds are exact."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert bool(((found - expected).abs() <= (length + 2) * 2.0**-24 * magnitudes).all())


def check(products: BlockProducts, case: Case) -> None:
    """Checks the three products against the dense weight."""
    x, grad, values, bias = case.x.float(), case.grad.float(), case.values.float(), case.bias.float()
    weight, shape = case.weight, case.weight.shape
    size = values.shape
    for added in (bias, None):
        expected, magnitudes = case.x @ weight.t(), case.x.abs() @ weight.abs().t()
        if added is not None:
            expected, magnitudes = expected + case.bias, magnitudes + case.bias.abs()
        assert_near(products.product(x, values, case.mask, added, shape), expected, magnitudes, shape[1] + 1)
    grad_x = products.transposed_product(grad, values, case.mask, shape)
    assert_near(grad_x, case.grad @ weight, case.grad.abs() @ weight.abs(), shape[0])

    def active_blocks(dense: Tensor) -> Tensor:
        height, width = size[2], size[1]
        tiles = dense.view(ROWS, height, COLUMNS, width).permute(0, 2, 3, 1)
        return tiles.reshape(-1, width, height)[case.active]

    expected, magnitudes = case.grad.t() @ case.x, case.grad.t().abs() @ case.x.abs()
    gradient = products.active_gradient(grad, x, case.mask, size)
    assert_near(gradient, active_blocks(expected), active_blocks(magnitudes), len(x))


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def compiled(request: pytest.FixtureRequest) -> CpuBlockProducts:
    return cpu_block_products.load(request.param)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("height", [16, 32, 48, 64, 128])
def test_compiled_products_equal_dense_ones(compiled: CpuBlockProducts, height: int, width: int) -> None:
    for seed, active in enumerate(masks()):
        for tokens in TOKENS:
            check(compiled, case(height, width, tokens, active, seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_products_of_fewer_bits_are_the_rounded_fp32_ones(compiled: CpuBlockProducts, dtype: torch.dtype) -> None:
    *_, active = masks()
    factors = case(32, 4, 13, active)
    x, grad, values, bias = (t.to(dtype) for t in (factors.x, factors.grad, factors.values, factors.bias))
    shape, size = factors.weight.shape, factors.values.shape
    few = (
        compiled.product(x, values, factors.mask, bias, shape),
        compiled.transposed_product(grad, values, factors.mask, shape),
        compiled.active_gradient(grad, x, factors.mask, size),
    )
    x, grad, values, bias = x.float(), grad.float(), values.float(), bias.float()
    many = (
        compiled.product(x, values, factors.mask, bias, shape),
        compiled.transposed_product(grad, values, factors.mask, shape),
        compiled.active_gradient(grad, x, factors.mask, size),
    )
    for found, expected in zip(few, many, strict=True):
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize(
    ("shape", "dtype", "path"),
    [
        ((9, 1, 16), torch.float32, "CpuBlockProducts"),
        ((9, 8, 48), torch.bfloat16, "CpuBlockProducts"),
        ((9, 8, 8), torch.float32, "DenseProducts"),
        ((9, 1, 16), torch.float64, "DenseProducts"),
        ((9, 1, 128), torch.float64, "torch_block_products"),
        ((9, 1, 132), torch.float32, "torch_block_products"),
    ],
)
def test_blocks_have_the_path_of_their_rows_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    found = block_products._path(torch.Size(shape), torch.device("cpu"), dtype)
    assert getattr(found, "__name__", type(found).__name__).endswith(path)
    assert block_products.is_sized(torch.Size(shape), torch.device("cpu"), dtype) == (path != "DenseProducts")


@pytest.mark.parametrize(("height", "width"), [(16, 1), (17, 3), (64, 16)])
def test_products_in_calls_to_blas_equal_dense_ones(height: int, width: int) -> None:
    for seed, active in enumerate(masks()):
        for tokens in TOKENS:
            check(torch_block_products, case(height, width, tokens, active, seed))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 3), (48, 5), (4, 4), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_take_any_leading_dimensions_and_strides(dtype: torch.dtype, height: int, width: int) -> None:
    *_, active = masks()
    factors = case(height, width, 24, active)
    x, grad, values, bias = (t.to(dtype) for t in (factors.x, factors.grad, factors.values, factors.bias))
    shape = factors.weight.shape
    for leading in ((24,), (2, 3, 4), ()):
        inputs = x[5] if not leading else x.t().contiguous().t().view(*leading, -1)
        grads = grad[5] if not leading else grad.view(*leading, -1)
        y = block_products.product(inputs, values, factors.mask, bias, shape)
        assert torch.allclose(y.double(), inputs.double() @ factors.weight.t() + factors.bias, atol=1e-4)
        grad_x = block_products.transposed_product(grads, values, factors.mask, shape)
        assert torch.allclose(grad_x.double(), grads.double() @ factors.weight, atol=1e-4)
        found = block_products.active_gradient(grads, inputs, factors.mask, values.shape)
        dense = grads.double().view(-1, shape[0]).t() @ inputs.double().view(-1, shape[1])
        blocks = dense.view(ROWS, height, COLUMNS, width).permute(0, 2, 3, 1).reshape(-1, width, height)[active]
        assert torch.allclose(found.double(), blocks, atol=1e-4)


def test_the_number_of_threads_changes_no_bit(compiled: CpuBlockProducts) -> None:
    factors = case(48, 3, 5000, torch.arange(ROWS * COLUMNS) % 3 > 0)
    x, grad, values = factors.x.float(), factors.grad.float(), factors.values.float()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 6, 7):
            torch.set_num_threads(threads)
            results.append(
                (
                    compiled.product(x, values, factors.mask, None, factors.weight.shape),
                    compiled.transposed_product(grad, values, factors.mask, factors.weight.shape),
                    compiled.active_gradient(grad, x, factors.mask, values.shape),
                )
            )
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("too_many", [-1, 1])
def test_a_mask_of_another_count_is_refused(compiled: CpuBlockProducts, too_many: int) -> None:
    *_, active = masks()
    factors = case(16, 2, 5, active)
    x, grad, values = factors.x.float(), factors.grad.float(), factors.values.float()
    changed = active.clone()
    changed[(~active if too_many > 0 else active).nonzero()[0]] = too_many > 0
    mask, message = bits.pack(changed), f"the mask has {len(values) + too_many} active positions, not {len(values)}"
    for path in (compiled, torch_block_products):
        with pytest.raises(ValueError, match=message):
            path.product(x, values, mask, None, factors.weight.shape)
        with pytest.raises(ValueError, match=message):
            path.transposed_product(grad, values, mask, factors.weight.shape)
        with pytest.raises(ValueError, match=message):
            path.active_gradient(grad, x, mask, values.shape)


def test_compiled_products_refuse_what_does_not_fit(compiled: CpuBlockProducts) -> None:
    """They would read past the end of it."""
    *_, active = masks()
    factors = case(16, 2, 5, active)
    x, values, bias, mask, shape = (
        factors.x.float(),
        factors.values.float(),
        factors.bias.float(),
        factors.mask,
        factors.weight.shape,
    )
    refused = [
        ((x[:, 1:].contiguous(), values, mask, bias, shape), r"of shape \[5, 10\], not \[5, 9\]"),
        ((x.t().contiguous().t(), values, mask, bias, shape), "expected a contiguous fp32 tensor"),
        ((x, values.double(), mask, bias, shape), "not .* torch.float64"),
        ((x, values, mask, bias[1:], shape), r"of shape \[48\], not \[47\]"),
        ((x, values, mask[:1], bias, shape), "15 positions need 2 uint8, not 1"),
        ((x, values, mask, bias, torch.Size([49, 10])), r"\[49, 10\] can't be multiplied in blocks of 16 x 2"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            compiled.product(*arguments)
    with pytest.raises(ValueError, match=r"of shape \[4, 48\], not \[5, 48\]"):
        compiled.active_gradient(factors.grad.float(), x[:4], mask, values.shape)
