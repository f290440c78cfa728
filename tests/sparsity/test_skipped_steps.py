"""A step that wasn't applied leaves nothing in the growth window, and moves no weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from svite_scale.parallel.torch_access import TorchAccess
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.schedules import UpdateSchedule
from svite_scale.sparsity.sparsify import sparsify
from svite_scale.sparsity.topology import TopologyEngine

WINDOW, UPDATE_EVERY = 3, 6
STEPS = range(4, 6)
"""Of the window before the update after step 6, those before the last."""


def listening(grow_by: str) -> tuple[nn.Module, TopologyEngine]:
    """A linear layer of 8 x 8, three steps before its first update."""
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, 0.5)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    schedule = UpdateSchedule(total_steps=100, update_every=UPDATE_EVERY)
    options = TopologyOptions(grow_window=WINDOW, grow_by=grow_by)
    topology = TopologyEngine(model, TorchAccess(optimizer), schedule, options)
    for _ in range(UPDATE_EVERY - WINDOW):
        topology.step()
    return model, topology


def backward(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    """One backward; returns the gradient of the whole weight, an outer product."""
    generator = torch.Generator().manual_seed(step)
    images, slopes = torch.randn(1, 8, generator=generator), torch.randn(8, generator=generator)
    (scale * (model(images) * slopes).sum()).backward()
    return slopes.outer(images[0])


@pytest.mark.parametrize("skipped", [4, 5])
@pytest.mark.parametrize("grow_by", ["gradient", "magnitude"])
def test_its_gradient_is_left_out_of_the_mean(grow_by: str, skipped: int) -> None:
    model, topology = listening(grow_by)
    gradients = []
    for step in (4, 5, 6):
        gradient = backward(model, step, torch.nan if step == skipped else 1.0)
        if step != skipped:
            gradients.append(gradient)
        if step < UPDATE_EVERY:
            assert topology.step(applied=step != skipped) is None
    scores: list[Tensor] = []
    gather = topology.growth.gather

    def heard(layer: object) -> Tensor:
        scores.append(gather(layer))  # type: ignore[arg-type]
        return scores[-1]

    topology.growth.gather = heard  # type: ignore[method-assign]
    update = topology.step()
    assert update is not None
    mean = sum(gradients) / 2 if grow_by == "gradient" else sum(gradient.abs() for gradient in gradients) / 2
    torch.testing.assert_close(scores[0], mean.abs().flatten())
    assert topology.postponed == 0


def test_an_update_due_with_it_waits_for_another_window() -> None:
    model, topology = listening("gradient")
    before = topology.access.read(next(iter(topology.layers.values())).mask).clone()
    for step in (4, 5, 6):
        backward(model, step)
        assert topology.step(applied=step != 6) is None
    assert (topology.steps, topology.postponed) == (6, 1)
    assert torch.equal(topology.access.read(next(iter(topology.layers.values())).mask), before)
    assert topology.next_update == 6 + WINDOW
    for step in (7, 8):
        backward(model, step)
        assert topology.step() is None
    backward(model, 9)
    assert topology.step() is not None


def test_a_window_of_skipped_steps_moves_nothing() -> None:
    _, topology = listening("gradient")
    for _ in range(WINDOW):
        assert topology.step(applied=False) is None
    assert topology.postponed == 1
