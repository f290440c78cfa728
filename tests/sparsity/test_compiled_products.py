"""Sparse layers under torch.compile: growth windows open and close without compiling again."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.func import functional_call, grad, vmap

from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.models.structure import pack_units
from svite_scale.sparsity import hooks
from svite_scale.sparsity.layers.base import SparseLayer, sparse_layers
from svite_scale.sparsity.packing import sparsify
from tests.sparsity.test_packed_weight import saved_tensors

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", num_classes=4, image_size=16, in_channels=1, patch_size=4, embed_dim=16, depth=1, num_heads=4
)


def weights(model: nn.Module) -> None:
    sparsify(model, 0.5)


def blocks(model: nn.Module) -> None:
    sparsify(model, 0.5, block=(16, 4))


def small_blocks(model: nn.Module) -> None:
    sparsify(model, 0.5, block=(4, 2))


def units(model: nn.Module) -> None:
    pack_units(model, heads=0.5, neurons=0.5)


def paper_units(model: nn.Module) -> None:
    pack_units(model, heads=0.5, neurons=0.5, grow="paper")


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "weights": weights,
    "blocks": blocks,
    "small blocks": small_blocks,
    "units": units,
    "paper units": paper_units,
}


class CountingBackend:
    """A backend that counts the graphs that it compiles. Inductor would take half a minute for each."""

    def __init__(self, compiler: str = "aot_eager") -> None:
        self.graphs = 0
        self.compiler = compiler

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        result = lookup_backend(self.compiler)(module, inputs)
        self.graphs += 1
        return result


def build_block(kind: str) -> nn.Module:
    """Returns a transformer block with sparse layers."""
    torch.manual_seed(0)
    model = build_dense(MODEL)
    KINDS[kind](model)
    return model.blocks[0]


def record(block: nn.Module) -> dict[str, list[Tensor]]:
    """Opens a growth window. Returns, by layer name, the gradients that the hooks get."""
    recorded: dict[str, list[Tensor]] = {}

    def hook_for(name: str) -> hooks.GradientHook:
        return lambda gradient: recorded.setdefault(name, []).append(gradient.clone())

    for name, layer in sparse_layers(block).items():
        layer.gradient_hook = hook_for(name)
    return recorded


def stop_recording(block: nn.Module) -> None:
    for layer in sparse_layers(block).values():
        layer.gradient_hook = None


def assert_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        assert len(found[name]) == len(gradients)
        for one, other in zip(found[name], gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_growth_window_opens_and_closes_without_compiling_again(kind: str) -> None:
    eager = build_block(kind)
    block = copy.deepcopy(eager)
    backend = CountingBackend()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x, upstream = torch.randn(3, 17, 16), torch.randn(3, 17, 16)
    for is_open in (False, True, False, True):
        recorded = [record(each) if is_open else {} for each in (eager, block)]
        for module in (eager, compiled):
            module(x).backward(upstream)
        assert set(recorded[1]) == (set(sparse_layers(block)) if is_open else set())
        assert_same(recorded[1], recorded[0])
        for each in (eager, block):
            stop_recording(each)
    assert backend.graphs == 1
    for (name, one), other in zip(block.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["weights", "blocks", "small blocks"])
def test_a_compiled_forward_keeps_no_dense_weight_for_its_backward(kind: str) -> None:
    """A compiler may compute a term of the backward that it needs in the forward too once, and keep it."""
    block = build_block(kind)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 17, 16)
    sizes = []
    for module in (block, compiled):
        with saved_tensors() as saved:
            module(x)
        sizes.append(sum({tensor.data_ptr(): tensor.nbytes for tensor in saved}.values()))
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_calls_in_one_graph_are_recorded_each(kind: str) -> None:
    """A compiler may compute equal terms once, but gradients add up."""
    block = build_block(kind)
    compiled = torch.compile(lambda x: block(x) + block(x), fullgraph=True, backend="aot_eager")
    recorded = record(block)
    compiled(torch.randn(3, 17, 16)).sum().backward()
    assert {name: len(gradients) for name, gradients in recorded.items()} == dict.fromkeys(sparse_layers(block), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_recorded_sample_by_sample_under_vmap(kind: str) -> None:
    block = build_block(kind)
    x, upstream = torch.randn(3, 17, 16), torch.randn(3, 17, 16)
    parameters = {name: p.detach() for name, p in block.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor, upstream: Tensor) -> Tensor:
        return (functional_call(block, parameters, (x[None],)) * upstream).sum()

    recorded = record(block)
    vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, upstream)
    expected = record(block)
    for image, gradient in zip(x, upstream, strict=True):
        block(image[None]).backward(gradient[None])
    assert_same(recorded, expected)


def test_a_copied_or_unpickled_layer_has_a_handle_of_its_own() -> None:
    (layer, *_) = sparse_layers(build_block("weights")).values()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies: list[SparseLayer] = [copy.copy(layer), copy.deepcopy(layer), torch.load(file, weights_only=False)]
    layer.gradient_hook = print
    assert hooks.recording_layer(layer.handle) is layer
    for each in copies:
        assert hooks.recording_layer(each.handle) is None
        each.gradient_hook = print
        assert hooks.recording_layer(each.handle) is each


def test_a_handle_does_not_keep_its_layer_alive() -> None:
    (layer, *_) = sparse_layers(build_block("weights")).values()
    layer.gradient_hook = print
    handle, alive = layer.handle, weakref.ref(layer)
    del layer, _
    gc.collect()
    assert alive() is None
    assert hooks.recording_layer(handle) is None
