"""The token selector under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend

from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.models.token_insertion import insert_token_selectors

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", num_classes=4, image_size=16, in_channels=1, patch_size=4, embed_dim=16, depth=2, num_heads=2
)


def test_a_compiled_model_evaluates_alike_and_trains_without_compiling_again() -> None:
    torch.manual_seed(0)
    model = build_dense(MODEL)
    (selector,) = insert_token_selectors(model, keep=0.6, signal="paper", keep_warmup=0.0)
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


def test_the_temperature_reaches_the_compiled_gradient() -> None:
    """A number taken in at compilation would be that of the first step."""
    torch.manual_seed(0)
    model = build_dense(MODEL)
    (selector,) = insert_token_selectors(model, keep=0.6, signal="paper", keep_warmup=0.0)
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
