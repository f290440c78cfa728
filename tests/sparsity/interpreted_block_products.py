"""The Triton kernels of blocks: on CPU tensors under Triton's interpreter, or compiled on a GPU.

test_triton_block_products.py runs these tests in a process of their own, because Triton reads TRITON_INTERPRET when it is
imported. The interpreter can't multiply bf16.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import triton_block_products as triton_products

pytestmark = pytest.mark.slow  # compiled, Triton starts a compiler
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [(16, 16), (32, 16), (16, 48), (64, 32), (96, 16), (144, 32)]
"""V and U. 144 rows take two programs."""


class Case(NamedTuple):
    """A weight of 4 by 5 blocks and its factors, float64."""

    x: Tensor
    grad: Tensor
    values: Tensor
    bias: Tensor
    active: Tensor
    weight: Tensor


def case_of(block: tuple[int, int], active: Tensor, num_tokens: int = 37) -> Case:
    """Draws factors that fp16 holds exactly."""
    height, width = block
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half().double()

    values = draw(int(active.sum()), width, height)
    weight = dense_weight(values, active)
    return Case(draw(num_tokens, weight.shape[1]), draw(num_tokens, weight.shape[0]), values, draw(len(weight)), active, weight)


def dense_weight(values: Tensor, active: Tensor) -> Tensor:
    """Places block after block."""
    (num_rows, num_columns), (_, width, height) = active.shape, values.shape
    weight = values.new_zeros(num_rows * height, num_columns * width)
    for block, (row, column) in zip(values, active.nonzero().tolist(), strict=True):
        weight[row * height : (row + 1) * height, column * width : (column + 1) * width] = block.t()
    return weight


def some_active(density: float = 0.5) -> Tensor:
    """Returns 4 by 5 blocks with a full row, an empty row, and an empty column."""
    active = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < density
    active[1], active[2] = True, False
    active[:, 3] = False
    return active


def check_products(case: Case, dtype: torch.dtype = torch.float32, with_bias: bool = True) -> None:
    """Compares the three products with the dense ones."""
    x, grad, values, bias = (tensor.to(DEVICE, dtype) for tensor in (case.x, case.grad, case.values, case.bias))
    mask, shape = bits.pack(case.active.flatten()).to(DEVICE), case.weight.shape
    y = triton_products.product(x, values, mask, bias if with_bias else None, shape)
    assert_near(y, case.x @ case.weight.t() + case.bias * with_bias, num_summed=x.shape[1])
    assert_near(triton_products.transposed_product(grad, values, mask, shape), case.grad @ case.weight, num_summed=len(bias))
    (num_rows, num_columns), (_, width, height) = case.active.shape, values.shape
    gradient = (case.grad.t() @ case.x).view(num_rows, height, num_columns, width).permute(0, 2, 3, 1)[case.active]
    assert_near(triton_products.active_gradient(grad, x, mask, values.shape), gradient, num_summed=len(x))


def assert_near(found: Tensor, expected: Tensor, num_summed: int = 64) -> None:
    assert found.shape == expected.shape
    rounding, of_sums = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2 * rounding, atol=max(num_summed, 64) * of_sums)


@pytest.fixture(params=range(6))
def one_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with each of the sizes of tiles."""
    for kernel in (triton_products._product_kernel, triton_products._gradient_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[request.param % len(kernel.configs) :][:1])


@pytest.fixture
def first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves one size of tiles, since the interpreter can't time them."""
    for kernel in (triton_products._product_kernel, triton_products._gradient_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


@pytest.mark.usefixtures("first_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_products_are_those_of_the_dense_weight(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_products(case_of(block, some_active()), dtype)


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("block", [(32, 16)])
def test_each_size_of_tiles_gives_the_same(block: tuple[int, int]) -> None:
    check_products(case_of(block, some_active(), num_tokens=300))


@pytest.mark.usefixtures("first_tile")
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 64, 65])
def test_any_number_of_tokens(num_tokens: int) -> None:
    check_products(case_of((32, 16), some_active(), num_tokens), with_bias=False)


@pytest.mark.usefixtures("first_tile")
@pytest.mark.parametrize("density", [0, 1])
def test_no_block_or_all_blocks(density: int) -> None:
    check_products(case_of((16, 32), torch.full((3, 7), density, dtype=torch.bool)))


@pytest.mark.parametrize("tile", [16, 128, triton_products.INDEX_TILE])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (9, 20)])
def test_the_index_lists_the_active_blocks_of_each_row_and_each_column(
    size: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_products, "INDEX_TILE", tile)
    active = torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.3
    mask = bits.pack(active.flatten()).to(DEVICE)
    rows, columns = active.nonzero().t()
    starts, found = triton_products._index_rows(mask, *size, num_active=len(rows))
    assert starts.tolist() == [0, *active.sum(1).cumsum(0).tolist()]
    assert found.tolist() == columns.tolist()
    starts, *found_of_columns = triton_products._index_columns(mask, *size, num_active=len(rows))
    assert starts.tolist() == [0, *active.sum(0).cumsum(0).tolist()]
    places = columns.argsort(stable=True)
    assert [tensor.tolist() for tensor in found_of_columns] == [rows[places].tolist(), places.tolist()]


@pytest.mark.usefixtures("first_tile")
def test_a_gradient_split_over_tokens() -> None:
    case = case_of((16, 16), some_active(), num_tokens=3 * triton_products.LEAST_TOKENS + 5)
    check_products(case, DTYPES[-1])
    assert triton_products._num_parts(len(case.x), 1) == 3


@pytest.mark.usefixtures("first_tile")
@pytest.mark.parametrize("difference", [-3, 3])
def test_a_mask_of_another_count_stays_inside_the_buffers(difference: int) -> None:
    """Values are a slice of a longer tensor of NaNs, which would show in the products."""
    case = case_of((16, 16), some_active())
    count = len(case.values)
    longer = torch.full((count + 8, 16, 16), torch.nan)
    values = longer[: count + difference]
    values[:count] = case.values[: len(values)]
    values = values.to(DEVICE)
    first = case.active.clone()
    first.view(-1)[first.flatten().nonzero()[len(values) :]] = False
    weight = dense_weight(case.values[: len(values)], first)
    x, grad = case.x.to(DEVICE, torch.float32), case.grad.to(DEVICE, torch.float32)
    mask = bits.pack(case.active.flatten()).to(DEVICE)
    assert_near(triton_products.product(x, values, mask, None, weight.shape), case.x @ weight.t())
    assert_near(triton_products.transposed_product(grad, values, mask, weight.shape), case.grad @ weight)
    assert triton_products.active_gradient(grad, x, mask, values.shape).shape == values.shape


def test_a_mask_of_another_size_is_refused() -> None:
    case = case_of((16, 16), some_active())
    x, grad, values = (tensor.to(DEVICE, torch.float32) for tensor in (case.x, case.grad, case.values))
    mask = torch.full((2,), 255, dtype=torch.uint8, device=DEVICE)
    for multiply in (
        lambda: triton_products.product(x, values, mask, None, case.weight.shape),
        lambda: triton_products.transposed_product(grad, values, mask, case.weight.shape),
        lambda: triton_products.active_gradient(grad, x, mask, values.shape),
    ):
        with pytest.raises(ValueError, match="20 positions need 3 uint8, not 2"):
            multiply()


@pytest.mark.skipif(not INTERPRETED, reason="counts what Triton would time")
def test_tiles_are_timed_once_for_numbers_of_tokens_of_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    for kernel in (triton_products._product_kernel, triton_products._gradient_kernel):
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "_do_bench", lambda _, quantiles: timed.append(1) or [0.0] * 3)
    counts = []
    for num_tokens, dtype in [(260, torch.float16), (300, torch.float16), (100, torch.float16), (100, torch.float32)]:
        check_products(case_of((32, 16), some_active(), num_tokens), dtype)
        counts.append(len(timed))
    assert counts == [6 + 6 + 5, 6 + 6 + 5, 6 + 6 + 5 + 4 + 4 + 5, 6 + 6 + 5 + 4 + 4 + 5]


@pytest.mark.usefixtures("first_tile")
def test_trying_out_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_products, "DTYPES", DTYPES)
    triton_products.try_out(torch.device(DEVICE))
    right = triton_products.transposed_product
    monkeypatch.setattr(triton_products, "transposed_product", lambda *arguments: right(*arguments).roll(1))
    with pytest.raises(RuntimeError, match=r"wrong result for torch\.float32"):
        triton_products.try_out(torch.device(DEVICE))
