"""Packed models under torch.func, torch.export and torch.compile, beside their dense twins."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels.operators import compress, expand
from svite_scale.sparsity.packing import sparsify
from tests.sparsity.packing import packed_layers, positions_of_units


class Small(nn.Module):
    """A model that calls its layers, and reads the weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding="same")
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.conv(x).flatten(2).mean(dim=2)).tanh()
        return self.last(hidden) @ self.first.weight.t()


BLOCKS = [(1, 1), (16, 1), (2, 2)]
"""Single weights; blocks that are multiplied at the size of what is active, of one layer; and others, of both linear layers."""


class Pair:
    """A packed float64 model and its dense twin with zeros."""

    def __init__(self, block: tuple[int, int] = (1, 1), seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.packed = Small().double()
        self.dense = copy.deepcopy(self.packed)
        sparsify(self.packed, 0.5, distribution="uniform", block=block, seed=seed)
        with torch.no_grad():
            for name, layer in packed_layers(self.packed).items():
                self.dense.get_submodule(name).weight.copy_(layer.dense_weight())
        self.x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
        self.packed_parameters = {n: p.detach() for n, p in self.packed.named_parameters() if p.requires_grad}
        self.dense_parameters = {n: p.detach() for n, p in self.dense.named_parameters()}

    def positions(self, name: str) -> Tensor:
        """Where the values of a layer are in its flat weight, int64, shaped like them."""
        layer = packed_layers(self.packed)[name]
        units = bits.unpack(layer.mask, layer.shape.numel())
        return positions_of_units(layer.grid.shape, layer.grid.block)[units].view(layer.values.shape)

    def assert_same(self, packed: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
        """Compares what was differentiated by parameters, whose dimensions are the last ones."""
        for name, found in packed.items():
            layer, _, key = name.rpartition(".")
            expected = dense[f"{layer}.weight" if key == "values" else name]
            if key == "values":
                dims = packed_layers(self.packed)[layer].grid.shape
                expected = expected.flatten(-len(dims))[..., self.positions(layer)]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_per_batch_and_per_sample_are_those_of_the_dense_model(block: tuple[int, int]) -> None:
    pair = Pair(block)

    def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    pair.assert_same(
        grad(lambda p: loss(pair.packed, p, pair.x))(pair.packed_parameters),
        grad(lambda p: loss(pair.dense, p, pair.x))(pair.dense_parameters),
    )
    pair.assert_same(
        vmap(grad(lambda p, x: loss(pair.packed, p, x[None])), in_dims=(None, 0))(pair.packed_parameters, pair.x),
        vmap(grad(lambda p, x: loss(pair.dense, p, x[None])), in_dims=(None, 0))(pair.dense_parameters, pair.x),
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_jacobians_and_hessians_are_those_of_the_dense_model(block: tuple[int, int]) -> None:
    pair = Pair(block)
    pair.assert_same(
        jacrev(lambda p: functional_call(pair.packed, p, (pair.x,)))(pair.packed_parameters),
        jacrev(lambda p: functional_call(pair.dense, p, (pair.x,)))(pair.dense_parameters),
    )

    def curvature(model: nn.Module) -> Tensor:
        return jacrev(grad(lambda x: model(x).square().sum()))(pair.x)

    torch.testing.assert_close(curvature(pair.packed), curvature(pair.dense), rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="implement the jvp"):
        hessian(lambda x: pair.packed(x).square().sum())(pair.x)  # forward over reverse


@pytest.mark.parametrize("block", BLOCKS)
def test_an_ensemble_runs_under_vmap_each_with_masks_of_its_own(block: tuple[int, int]) -> None:
    first, second = Pair(block, 0), Pair(block, 1)
    parameters, buffers = stack_module_state([first.packed, second.packed])  # type: ignore[list-item]
    base = copy.deepcopy(first.packed).to("meta")
    assert not torch.equal(*parameters["first.mask"])
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (first.x,)))(parameters, buffers)
    for output, pair in zip(outputs, (first, second), strict=True):
        torch.testing.assert_close(output, pair.dense(first.x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [(0, 0), (1, 1), (2, None), (None, 1)])
def test_the_operators_take_batches_along_any_dimension(dims: tuple[int | None, int | None]) -> None:
    """Of dense weights or values, of masks, or of both."""
    generator = torch.Generator().manual_seed(0)
    active = torch.stack([torch.randperm(12, generator=generator) < 5 for _ in range(3)])
    masks, dense = torch.stack([bits.pack(row) for row in active]), torch.randn(3, 3, 4, generator=generator)
    values = torch.stack([matrix.flatten()[row] for matrix, row in zip(dense, active, strict=True)])

    def along(batch: Tensor, dim: int | None) -> Tensor:
        return batch[0] if dim is None else batch.movedim(0, min(dim, batch.dim() - 1))

    def picked(dim: int | None, number: int) -> int:
        return 0 if dim is None else number

    in_dims = tuple(dim if dim is None else min(dim, 1) for dim in dims)
    packed = vmap(lambda d, m: compress(d, m, 5), in_dims=dims)(along(dense, dims[0]), along(masks, dims[1]))
    whole = vmap(lambda v, m: expand(v, m, [3, 4]), in_dims=in_dims)(along(values, in_dims[0]), along(masks, dims[1]))
    for number in range(3):
        row = active[picked(dims[1], number)]
        assert torch.equal(packed[number], dense[picked(dims[0], number)].flatten()[row])
        expected = torch.zeros(12).masked_scatter(row, values[picked(dims[0], number)])
        assert torch.equal(whole[number], expected.view(3, 4))


@pytest.mark.parametrize(("strict", "block"), [(False, (1, 1)), (True, (1, 1)), (False, (16, 1)), (False, (2, 2))])
def test_an_exported_program_computes_what_the_model_does(strict: bool, block: tuple[int, int]) -> None:
    pair, file = Pair(block), io.BytesIO()
    batch = torch.export.Dim("batch", min=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(pair.packed, (pair.x,), dynamic_shapes=({0: batch},), strict=strict)
        torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (pair.x, torch.cat([pair.x, -pair.x])):
        torch.testing.assert_close(loaded(x), pair.dense(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_compiles_into_one_graph(block: tuple[int, int]) -> None:
    pair = Pair(block)
    compiled = torch.compile(pair.packed, fullgraph=True, backend="aot_eager")
    compiled(pair.x).square().sum().backward()
    pair.dense(pair.x).square().sum().backward()
    gradients = {name: p.grad for name, p in pair.packed.named_parameters() if p.grad is not None}
    assert set(gradients) == set(pair.packed_parameters)
    pair.assert_same(gradients, {name: p.grad for name, p in pair.dense.named_parameters() if p.grad is not None})
