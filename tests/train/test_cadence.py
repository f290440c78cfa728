"""What is due after a step, from the step and the config alone."""

from __future__ import annotations

import pytest

from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.data.order import EpochSteps
from svite_scale.train.cadence import Cadence, Due
from svite_scale.train.options import TrainConfig

WHOLE, CARRIED = EpochSteps(40, 10, carry=False), EpochSteps(45, 10, carry=True)
"""4 steps an epoch; and 4.5, so that epochs end in steps 5, 9, 14 and 18."""


def cadence(steps: EpochSteps = WHOLE, *, train: dict[str, int] | None = None, **checkpoint: int) -> Cadence:
    options = {"epochs": 4, "log_every": 100, "eval_every_epochs": 100, **(train or {})}
    return Cadence(steps, TrainConfig(**options), CheckpointConfig(**checkpoint))  # type: ignore[arg-type]


def steps_of(kind: str, found: Cadence) -> list[int]:
    """Returns the steps of a run after which something is due."""
    return [step for step in range(1, found.last_step + 1) if getattr(found.due(step, stopping=False), kind)]


@pytest.mark.parametrize(
    ("max_steps", "last_step"),
    [({}, 16), ({"max_steps": 7}, 7), ({"max_steps": 16}, 16), ({"max_steps": 99}, 16)],
)
def test_run_ends_after_all_epochs_or_max_steps(max_steps: dict[str, int], last_step: int) -> None:
    found = cadence(train=max_steps)
    assert (found.total_steps, found.last_step) == (16, last_step)
    assert steps_of("last", found) == steps_of("save", found) == steps_of("evaluate", found) == [last_step]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(WHOLE, 1, [4, 8, 12, 16]), (WHOLE, 2, [8, 16]), (WHOLE, 3, [12, 16]), (CARRIED, 1, [5, 9, 14, 18])],
)
def test_evaluation_and_saving_by_epochs_come_where_epochs_end_and_at_the_end(
    steps: EpochSteps, every: int, expected: list[int]
) -> None:
    assert steps_of("evaluate", cadence(steps, train={"eval_every_epochs": every})) == expected
    assert steps_of("save", cadence(steps, every_epochs=every)) == expected


def test_saving_by_steps_comes_beside_saving_by_epochs() -> None:
    assert steps_of("save", cadence(every_steps=5)) == [5, 10, 15, 16]
    assert steps_of("save", cadence(every_steps=5, every_epochs=2)) == [5, 8, 10, 15, 16]


def test_log_is_due_with_every_save_and_evaluation_too() -> None:
    assert steps_of("log", cadence(train={"log_every": 6})) == [6, 12, 16]
    assert steps_of("log", cadence(train={"log_every": 6, "eval_every_epochs": 2}, every_steps=5)) == [5, 6, 8, 10, 12, 15, 16]


def test_stop_saves_and_logs_but_does_not_evaluate() -> None:
    found = cadence(train={"eval_every_epochs": 1})
    for step in (3, 4):
        assert found.due(step, stopping=True) == Due(log=True, evaluate=False, save=True, stop=True, last=True)
    assert found.due(3, stopping=False) == Due(log=False, evaluate=False, save=False, stop=False, last=False)


def test_stop_is_not_due_at_the_end() -> None:
    assert cadence().due(16, stopping=True) == Due(log=True, evaluate=True, save=True, stop=False, last=True)


def test_stop_is_due_before_the_first_step() -> None:
    assert [cadence().due(0, stopping=stopping).stop for stopping in (True, False)] == [True, False]


def test_checkpoints_are_kept_where_epochs_end_or_never() -> None:
    assert [step for step in range(1, 17) if cadence(keep_every_epochs=2).keeps(step)] == [8, 16]
    assert not any(cadence().keeps(step) for step in range(1, 17))
