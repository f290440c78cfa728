"""A step that wasn't applied leaves nothing in the growth window, and moves no weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from svite_scale.engines.torch_access import TorchAccess
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.packing import sparsify
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule

WINDOW, UPDATE_EVERY = 3, 6
STEPS = range(4, 6)
"""Of the window before the update after step 6, those before the last."""


def engine_of(schedule: UpdateSchedule, options: TopologyOptions) -> tuple[nn.Module, TopologyEngine]:
    """A linear layer of 8 x 8, and the engine that moves its weights."""
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, 0.5)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    return model, TopologyEngine(model, TorchAccess(model, optimizer), schedule, options)


def listening(grow_by: str) -> tuple[nn.Module, TopologyEngine]:
    """Three steps before its first update."""
    schedule = UpdateSchedule(total_steps=100, update_every=UPDATE_EVERY)
    model, topology = engine_of(schedule, TopologyOptions(grow_window=WINDOW, grow_by=grow_by))
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
def test_a_skipped_step_is_left_out_of_the_mean(grow_by: str, skipped: int) -> None:
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

    def recorded(layer: object) -> Tensor:
        scores.append(gather(layer))  # type: ignore[arg-type]
        return scores[-1]

    topology.growth.gather = recorded  # type: ignore[method-assign]
    update = topology.step()
    assert update is not None
    mean = sum(gradients) / 2 if grow_by == "gradient" else sum(gradient.abs() for gradient in gradients) / 2
    torch.testing.assert_close(scores[0], mean.abs().flatten())
    assert topology.postponed == 0


def test_an_update_due_at_a_skipped_step_waits_for_another_window() -> None:
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


@pytest.mark.parametrize(
    ("window", "warmup", "skipped", "updates"),
    [
        (7, 0, {10}, [17, 30, 40]),
        (7, 0, {10, 17}, [24, 40]),
        (7, 0, {10, 17, 24, 31}, [38]),
        (5, 0, {10}, [15, 20, 30, 40]),
        (10, 0, {10}, [20, 30, 40]),
        (2, 8, {10}, [12, 20, 30, 40]),
        (2, 9, {10}, [12, 30, 40]),
        (7, 0, {40}, [10, 20, 30]),
        (7, 0, {30, 37}, [10, 20]),
    ],
)
@pytest.mark.parametrize("resumed_after", [None, 18, 22, 35])
def test_every_update_has_a_whole_window_and_no_warm_up_is_cut_short(
    window: int, warmup: int, skipped: set[int], updates: list[int], resumed_after: int | None
) -> None:
    """Updates are scheduled after every tenth step, up to the 40th."""
    schedule = UpdateSchedule(total_steps=50, update_every=10)
    options = TopologyOptions(grow_window=window, grown_warmup_steps=warmup)
    model, topology = engine_of(schedule, options)
    recorded, found = 0, []
    for step in range(1, 51):
        recorded = recorded + 1 if topology.growth.is_recording else 0
        backward(model, step)
        due = topology.next_update == step
        update = topology.step(applied=step not in skipped)
        assert not due or recorded == window
        recorded = 0 if due else recorded
        found += [update.step] if update else []
        if step == resumed_after:
            state = topology.state_dict()
            model, topology = engine_of(schedule, options)
            topology.load_state_dict(state)
    assert found == updates
    assert topology.postponed == len(skipped)


@pytest.mark.parametrize(
    ("step", "poison", "message"),
    [
        (6, 1.0, "the optimizer's step wasn't applied, so the topology update after step 6 is postponed to step 9"),
        (
            5,
            torch.nan,
            "a gradient of the growth window isn't finite, so the topology update after step 6 is postponed to step 9",
        ),
    ],
)
def test_a_postponed_update_warns_with_the_reason(
    step: int, poison: float, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, topology = listening("gradient")
    with caplog.at_level("WARNING", logger="svite_scale"):
        for each in (4, 5, 6):
            backward(model, each, poison if each == step else 1.0)
            assert topology.step(applied=each != step or poison != 1.0) is None
    assert caplog.messages == [message]


def test_an_update_that_cannot_come_before_the_stop_is_said_to_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, topology = engine_of(UpdateSchedule(total_steps=10, update_every=8), TopologyOptions())
    for step in range(1, 9):
        backward(model, step)
        topology.step(applied=step < 8)
    assert [message.partition(" is ")[2] for message in caplog.messages] == [
        "left out, for its next window would end past the stop"
    ]
    assert topology.next_update is None


def test_a_window_of_skipped_steps_moves_nothing() -> None:
    _, topology = listening("gradient")
    for _ in range(WINDOW):
        assert topology.step(applied=False) is None
    assert topology.postponed == 1
