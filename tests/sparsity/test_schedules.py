"""How many weights move, and when."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from svite_scale.models.packed_attention import PackedAttention
from svite_scale.models.packed_mlp import PackedMlp
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.layers.units import UnitLayer
from svite_scale.sparsity.topology.decision import num_moved
from svite_scale.sparsity.topology.schedule import UpdateSchedule, constant, cosine, linear
from tests import reference

Layer = TypeVar("Layer", bound=SparseLayer)


def is_update(schedule: UpdateSchedule, step: int) -> bool:
    return schedule.next_update(step - 1) == step


@pytest.mark.parametrize(("step", "rate"), [(0, 0.5), (50, 0.2525), (100, 0.005), (101, 0.005), (10**9, 0.005), (-1, 0.5)])
def test_cosine_has_its_values_by_hand(step: int, rate: float) -> None:
    assert cosine(0.5, step, 100) == pytest.approx(rate, rel=1e-12)


@given(initial=st.floats(0.0, 1.0), final=st.floats(0.0, 1.0), total=st.integers(1, 10**6), data=st.data())
def test_cosine_is_its_closed_form(initial: float, final: float, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    assert cosine(initial, step, total, final) == pytest.approx(reference.cosine_rate(initial, final, step, total), abs=1e-12)


@given(initial=st.floats(0.0, 1.0), final=st.floats(0.0, 1.0), total=st.integers(1, 10**6), data=st.data())
def test_linear_and_constant_are_their_closed_forms(initial: float, final: float, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    assert linear(initial, step, total, final) == pytest.approx((initial * (total - step) + final * step) / total, abs=1e-12)
    assert linear(initial, total + step, total, final) == pytest.approx(final, abs=1e-12)
    assert constant(initial, step, total, final) == initial


def test_cosine_of_no_steps_is_its_end() -> None:
    assert cosine(0.5, 0, 0, final=0.1) == 0.1


def test_updates_come_every_so_many_steps_until_the_stop() -> None:
    schedule = UpdateSchedule(total_steps=100, update_every=15)
    assert schedule.stop_step == 80
    assert [step for step in range(-20, 200) if is_update(schedule, step)] == [15, 30, 45, 60, 75]
    assert schedule.num_updates == 5


@given(total=st.integers(1, 300), every=st.integers(1, 400), stop=st.floats(0.0, 1.0))
def test_no_update_comes_after_the_stop(total: int, every: int, stop: float) -> None:
    schedule = UpdateSchedule(total_steps=total, update_every=every, stop_fraction=stop)
    updates = [step for step in range(total + 1) if is_update(schedule, step)]
    assert len(updates) == schedule.num_updates
    assert all(step % every == 0 and 0 < step <= stop * total + 1e-9 for step in updates)


@pytest.mark.parametrize(("stop", "total", "step"), [(0.29, 100, 29), (0.57, 100, 57), (0.8, 375300, 300240), (1.0, 7, 7)])
def test_the_stop_is_the_decimal_that_was_written(stop: float, total: int, step: int) -> None:
    assert UpdateSchedule(total_steps=total, update_every=1, stop_fraction=stop).stop_step == step


def test_numbers_may_be_numpys() -> None:
    schedule = UpdateSchedule(total_steps=np.int64(100), update_every=np.int64(10), stop_fraction=np.float64(0.29))  # type: ignore[arg-type]
    assert (schedule.stop_step, schedule.next_update(0), schedule.num_updates) == (29, 10, 2)


@given(total=st.integers(1, 120), every=st.integers(1, 130), start=st.integers(0, 130), stop=st.floats(0.0, 1.0))
def test_updates_are_the_multiples_between_start_and_stop(total: int, every: int, start: int, stop: float) -> None:
    schedule = UpdateSchedule(total_steps=total, update_every=every, start_step=start, stop_fraction=stop)
    updates = [step for step in range(1, schedule.stop_step + 1) if step % every == 0 and step >= start]
    assert [step for step in range(-1, total + 1) if is_update(schedule, step)] == updates
    assert schedule.num_updates == len(updates)
    for step in range(-1, total + 2):
        assert schedule.next_update(step) == next((update for update in updates if update > step), None)


@pytest.mark.parametrize("step", [1, 10, 79, 80])
def test_the_drop_fraction_falls_until_the_stop(step: int) -> None:
    schedule = UpdateSchedule(total_steps=100, update_every=1, drop_fraction=0.4, final_drop_fraction=0.1)
    assert schedule.drop_fraction_at(step) == pytest.approx(reference.cosine_rate(0.4, 0.1, step, 80))


@pytest.mark.parametrize(
    ("shape", "rates"), [("cosine", [0.4, 0.25, 0.1]), ("linear", [0.4, 0.25, 0.1]), ("constant", [0.4] * 3)]
)
def test_the_drop_fraction_falls_from_the_start(shape: str, rates: list[float]) -> None:
    final = {} if shape == "constant" else {"final_drop_fraction": 0.1}
    schedule = UpdateSchedule(total_steps=100, update_every=1, start_step=20, drop_fraction=0.4, drop_schedule=shape, **final)
    assert [schedule.drop_fraction_at(step) for step in (20, 50, 80)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0, "update_every": 1}, "total_steps = 0: is below 1; use a whole number of at least 1"),
        ({"total_steps": 1, "update_every": 0}, "update_every = 0: is below 1"),
        ({"total_steps": 100, "update_every": 2.5}, r"update_every = 2\.5: is not a whole number"),
        ({"total_steps": 1e5, "update_every": 2}, r"total_steps = 100000\.0: is not a whole number"),
        ({"total_steps": 100, "update_every": 2, "start_step": 0.5}, r"start_step = 0\.5: is not a whole number"),
        (
            {"total_steps": 1, "update_every": 1, "stop_fraction": 1.5},
            r"stop_fraction = 1\.5: is above 1\.0; use a number of at least 0\.0 and up to 1\.0",
        ),
        ({"total_steps": 1, "update_every": 1, "drop_fraction": 1.5}, r"drop_fraction = 1\.5: is above 1\.0"),
        (
            {"total_steps": 1, "update_every": 1, "drop_fraction": 0.1, "final_drop_fraction": 0.2},
            r"final_drop_fraction = 0\.2: is above drop_fraction \(0\.1\)",
        ),
        ({"total_steps": 1, "update_every": 1, "start_step": -1}, "start_step = -1: is below 0"),
        (
            {"total_steps": 1, "update_every": 1, "drop_schedule": "step"},
            "use one of cosine, linear, constant",
        ),
        ({"total_steps": 1, "update_evry": 1}, "update_evry = 1: is no option of UpdateSchedule; the nearest is update_every"),
        ({"total_steps": 1}, "update_every = None: is missing and has no default"),
        (
            {"total_steps": 1, "update_every": 1, "drop_schedule": "constant", "final_drop_fraction": 0.1},
            "final_drop_fraction = 0.1: isn't used by drop_schedule=constant; leave it out",
        ),
        ({"total_steps": 1, "update_every": 1, "final_drop_fraction": -0.1}, r"final_drop_fraction = -0\.1: is below 0\.0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateSchedule(**options)  # type: ignore[arg-type]


def test_a_constant_schedule_has_no_final_fraction() -> None:
    schedule = UpdateSchedule(total_steps=100, update_every=10, drop_fraction=0.001, drop_schedule="constant")
    assert schedule.drop_fraction_at(80) == 0.001


@pytest.mark.parametrize(
    ("num_active", "rate", "moved"), [(10, 0.5, 5), (11, 0.5, 6), (1, 0.005, 1), (7, 1.0, 7), (7, 0.0, 0), (1000, 0.0051, 6)]
)
def test_the_number_of_weights_moved_is_rounded_up(num_active: int, rate: float, moved: int) -> None:
    assert num_moved(layer_of(PackedLayer, num_active), rate, step=1, seed=0) == moved


@pytest.mark.parametrize("kind", [PackedMlp, PackedAttention])
@pytest.mark.parametrize(("num_active", "fraction"), [(3, 0.05), (3, 0.5), (3, 1.0), (40, 0.005), (40, 0.31), (40, 0.0)])
def test_the_number_of_units_moved_is_the_fraction_in_expectation(
    kind: type[UnitLayer], num_active: int, fraction: float
) -> None:
    layer = layer_of(kind, num_active)
    counts = [num_moved(layer, fraction, step, seed) for seed in range(20) for step in range(1, 101)]
    assert counts == [
        reference.num_units_moved(fraction, num_active, layer.name, step, seed) for seed in range(20) for step in range(1, 101)
    ]
    mean = fraction * num_active if kind is PackedMlp else min(fraction * num_active, 1.0)
    remainder = mean - math.floor(mean)
    deviation = math.sqrt(remainder * (1 - remainder) / len(counts))
    assert sum(counts) / len(counts) == pytest.approx(mean, abs=4 * deviation + 1e-12)
    assert max(counts) - min(counts) <= 1
    assert kind is PackedMlp or max(counts) <= 1


def test_layers_round_the_number_of_units_moved_by_their_names() -> None:
    layers = [layer_of(PackedMlp, 10, f"blocks.{index}.mlp.neurons") for index in range(400)]
    counts = [num_moved(layer, 0.05, step=1, seed=0) for layer in layers]
    assert set(counts) == {0, 1}
    assert sum(counts) == pytest.approx(200, abs=4 * 10)


def test_the_number_of_units_moved_falls_to_the_final_fraction() -> None:
    options = {"total_steps": 100, "update_every": 1, "drop_fraction": 0.4, "final_drop_fraction": 0.1}
    own = UpdateSchedule(**options, unit_drop_fraction=0.3)  # type: ignore[arg-type]
    assert [own.unit_drop_fraction_at(step) for step in (0, 40, 80)] == pytest.approx([0.3, 0.2, 0.1])
    lower = UpdateSchedule(**options, unit_drop_fraction=0.05)  # type: ignore[arg-type]
    assert [lower.unit_drop_fraction_at(step) for step in (0, 40, 80)] == pytest.approx([0.05] * 3)
    as_weights = UpdateSchedule(**options, unit_drop_fraction=None)  # type: ignore[arg-type]
    assert [as_weights.unit_drop_fraction_at(step) for step in (0, 40, 80)] == pytest.approx([0.4, 0.25, 0.1])
    still = UpdateSchedule(total_steps=100, update_every=1, drop_fraction=0.0, final_drop_fraction=0.0, unit_drop_fraction=0.2)
    assert [still.unit_drop_fraction_at(step) for step in (0, 40, 80)] == pytest.approx([0.2, 0.1, 0.0])


def layer_of(kind: type[Layer], num_active: int, name: str = "blocks.0.mlp.neurons") -> Layer:
    """A layer of which only these are known; of heads it gets their name."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.num_active, layer.name = num_active, "blocks.0.attn.heads" if kind is PackedAttention else name
    return layer
