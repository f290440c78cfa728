"""How many weights move, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svite_scale.sparsity.schedules import UpdateSchedule, cosine
from svite_scale.sparsity.topology import num_moved
from tests import reference


@pytest.mark.parametrize(("step", "rate"), [(0, 0.5), (50, 0.2525), (100, 0.005), (101, 0.005), (10**9, 0.005), (-1, 0.5)])
def test_cosine_by_hand(step: int, rate: float) -> None:
    assert cosine(0.5, step, 100) == pytest.approx(rate, rel=1e-12)


@given(initial=st.floats(0.0, 1.0), final=st.floats(0.0, 1.0), total=st.integers(1, 10**6), data=st.data())
def test_cosine_is_its_closed_form(initial: float, final: float, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    assert cosine(initial, step, total, final) == pytest.approx(reference.cosine_rate(initial, final, step, total), abs=1e-12)


def test_cosine_of_no_steps_is_its_end() -> None:
    assert cosine(0.5, 0, 0, final=0.1) == 0.1


def test_updates_come_every_so_many_steps_until_the_stop() -> None:
    schedule = UpdateSchedule(total_steps=100, update_every=15)
    assert schedule.stop_step == 80
    assert [step for step in range(-20, 200) if schedule.is_update(step)] == [15, 30, 45, 60, 75]
    assert schedule.num_updates == 5


@given(total=st.integers(1, 300), every=st.integers(1, 400), stop=st.floats(0.0, 1.0))
def test_no_update_comes_after_the_stop(total: int, every: int, stop: float) -> None:
    schedule = UpdateSchedule(total_steps=total, update_every=every, stop_fraction=stop)
    updates = [step for step in range(total + 1) if schedule.is_update(step)]
    assert len(updates) == schedule.num_updates
    assert all(step % every == 0 and 0 < step <= stop * total for step in updates)


@pytest.mark.parametrize("step", [1, 10, 79, 80])
def test_the_rate_falls_until_the_stop(step: int) -> None:
    schedule = UpdateSchedule(total_steps=100, update_every=1, drop_fraction=0.4, final_drop_fraction=0.1)
    assert schedule.rate(step) == pytest.approx(reference.cosine_rate(0.4, 0.1, step, 80))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0, "update_every": 1}, r"total_steps \(0\)"),
        ({"total_steps": 1, "update_every": 0}, r"update_every \(0\)"),
        ({"total_steps": 1, "update_every": 1, "stop_fraction": 1.5}, r"stop_fraction \(1\.5\)"),
        ({"total_steps": 1, "update_every": 1, "drop_fraction": 1.5}, r"drop_fraction \(1\.5\)"),
        ({"total_steps": 1, "update_every": 1, "drop_fraction": 0.1, "final_drop_fraction": 0.2}, r"\(0\.2\) <= drop_fraction"),
        ({"total_steps": 1, "update_every": 1, "final_drop_fraction": -0.1}, r"final_drop_fraction \(-0\.1\)"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateSchedule(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_active", "rate", "moved"), [(10, 0.5, 5), (11, 0.5, 6), (1, 0.005, 1), (7, 1.0, 7), (7, 0.0, 0), (1000, 0.0051, 6)]
)
def test_the_number_moved_is_rounded_up(num_active: int, rate: float, moved: int) -> None:
    assert num_moved(num_active, rate) == moved
