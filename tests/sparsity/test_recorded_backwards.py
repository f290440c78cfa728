"""Which backwards count for the growth statistics, and which are none of training's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import svite_scale


class Recorded:
    """A packed linear layer whose window is the step to come, and what it should have recorded."""

    def __init__(self, window: int = 1) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        svite_scale.sparsify(self.model, 0.5, distribution="uniform")
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.0)
        options = svite_scale.TopologyOptions(grow_window=window)
        self.topology = svite_scale.attach(self.model, optimizer, total_steps=100, update_every=window, options=options)
        self.expected = torch.zeros(3, 5)

    def loss(self, x: Tensor) -> Tensor:
        return self.model(x).square().sum() / 2

    def count(self, x: Tensor) -> None:
        """A backward that counts: the last layer's gradient is its output times its input."""
        self.loss(x).backward()
        with torch.no_grad():
            self.expected += self.model(x).T @ self.model[0](x)

    def check(self) -> None:
        layer = self.topology.layers["1"]
        self.topology.growth.end_step()
        steps = self.topology.growth.recorded_steps
        torch.testing.assert_close(self.topology.growth.gather(layer).view(3, 5) * steps, self.expected.abs())


def raising(x: Tensor) -> Tensor:
    """Passes on, but raises in backward."""
    y = x.clone()

    def fail(_: Tensor) -> Tensor:
        raise MemoryError("out of memory")

    y.register_hook(fail)
    return y


@pytest.mark.parametrize("window", [1, 2])
def test_a_backward_that_raises_discards_its_step(window: int) -> None:
    recorded = Recorded(window)
    if window == 2:
        recorded.count(torch.randn(2, 6))
        recorded.topology.step()
    before = recorded.expected.clone()
    recorded.count(torch.randn(2, 6))
    for _ in range(2):
        with pytest.raises(MemoryError):
            recorded.model[1](raising(recorded.model[0](torch.randn(2, 6)))).sum().backward()
    recorded.expected = before
    recorded.count(torch.randn(2, 6))
    recorded.count(torch.randn(3, 6))
    recorded.check()


def test_a_backward_within_another_one_discards_nothing() -> None:
    recorded = Recorded()
    x = torch.randn(2, 6, requires_grad=True)
    hidden = checkpoint(recorded.model[0], x, use_reentrant=True)
    recorded.model[1](hidden).square().sum().div(2).backward()
    with torch.no_grad():
        recorded.expected += recorded.model(x).T @ recorded.model[0](x)
    recorded.count(torch.randn(2, 6))
    recorded.check()


def test_gradients_of_inputs_alone_or_of_other_weights_are_not_recorded() -> None:
    recorded = Recorded()
    x = torch.randn(2, 6, requires_grad=True)
    recorded.count(torch.randn(2, 6))
    torch.autograd.grad(recorded.loss(x), x)
    recorded.loss(x).backward(inputs=[x])
    others = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in recorded.model.named_parameters()}
    functional_call(recorded.model, others, (x,)).square().sum().backward()
    recorded.check()


def test_gradients_of_the_weights_are_recorded_however_they_are_asked_for_and_in_evaluation_too() -> None:
    recorded = Recorded()
    recorded.model.eval()
    recorded.count(torch.randn(2, 6))
    x = torch.randn(2, 6)
    torch.autograd.grad(recorded.loss(x), [recorded.model[1].values])
    with torch.no_grad():
        recorded.expected += recorded.model(x).T @ recorded.model[0](x)
    own = dict(recorded.model.named_parameters())
    (functional_call(recorded.model, own, (x,)).square().sum() / 2).backward()
    with torch.no_grad():
        recorded.expected += recorded.model(x).T @ recorded.model[0](x)
    recorded.check()


def test_zero_grad_forgets_the_gradients_of_the_step() -> None:
    recorded = Recorded()
    recorded.loss(torch.randn(2, 6)).backward()
    recorded.topology.zero_grad()
    recorded.count(torch.randn(2, 6))
    recorded.check()
