"""The token selector under torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

import svite_scale
from svite_scale.engines.backend import EngineOptions
from svite_scale.engines.build import build_backend
from svite_scale.engines.options import ParallelConfig
from svite_scale.models.dense import blocks, build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.models.token_selector import selector_loss
from tests.engines.test_library_use import trainable
from tests.sparsity.test_compiled_products import CountingBackend

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", num_classes=4, image_size=16, in_channels=1, patch_size=4, embed_dim=16, depth=2, num_heads=2
)


def test_a_compiled_model_evaluates_alike_and_trains_without_compiling_again() -> None:
    torch.manual_seed(0)
    model = build_dense(MODEL)
    (selector,) = insert_token_selectors(model, keep=0.6, signal="paper")
    start = selector.weight.detach().clone()
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        # Whether a graph is compiled again is dynamo's decision, and inductor would take half a minute. A compiler may give up
        # midway and be asked again for the same graph.
        result = lookup_backend("aot_eager")(module, inputs)
        graphs += 1
        return result

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    images, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        selector.anneal(step / 40)
        loss = nn.functional.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert graphs == 1, "the temperature changes at each step"
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(selector.weight, start)

    with torch.no_grad():
        expected = model.eval()(images)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    assert graphs == 2, "one for training, one for evaluation"


@pytest.mark.parametrize("block", [(1, 1), (8, 4)])
def test_compiled_blocks_survive_the_warmup_of_keep(block: tuple[int, int]) -> None:
    """A block is compiled for all tokens, and then once more for any number of them."""
    torch.manual_seed(0)
    model = build_dense(replace(MODEL, image_size=28, depth=3))
    insert_token_selectors(model, keep=0.4, blocks=(0, 2), keep_warmup=0.5)
    svite_scale.sparsify(model, 0.5, block=block)
    torch.compiler.reset()
    counters.clear()
    counting = CountingBackend()
    torch.compiler.set_default_backend(counting)
    options = EngineOptions(device=torch.device("cpu"), wrap_units=blocks(model), micro_batch_size=8, compile=True)
    lengths, graphs = set(), []
    blocks(model)[0].register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0].shape[1]))
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8) % 4
    try:
        backend = build_backend(ParallelConfig(), model, lambda module: torch.optim.SGD(trainable(module), 0.1), options)
        topology = svite_scale.attach(model, backend.optimizer, total_steps=20, update_every=5)
        for step in range(20):
            backend.backward(nn.functional.cross_entropy(backend.forward(images), labels) + selector_loss(model, labels))
            backend.step()
            topology.step()
            graphs.append(counting.graphs)
            if step % 5 == 4:
                with torch.no_grad():
                    backend.forward(images)
    finally:
        torch.compiler.set_default_backend(None)
    assert len(lengths) == 8
    assert graphs[-1] <= 2 * 3, "blocks"
    assert not counters["recompile_limit"]
    assert not counters["graph_break"]


def test_the_temperature_reaches_the_compiled_gradient() -> None:
    """A number taken in at compilation would be that of the first step."""
    torch.manual_seed(0)
    model = build_dense(MODEL)
    (selector,) = insert_token_selectors(model, keep=0.6, signal="paper")
    selector.weight.detach().mul_(10)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    images = torch.randn(8, 1, 16, 16)
    for progress in (0.0, 0.5, 1.0):
        selector.anneal(progress)
        gradients = []
        for each in (model, compiled):
            torch.manual_seed(1)
            each(images).square().sum().backward()
            gradients.append(selector.weight.grad)
            model.zero_grad()
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
