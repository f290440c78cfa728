"""Epochs cut into steps: dropped and carried rows, and the ends of epochs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svite_scale.data.order import EpochSteps

SIZES = st.integers(1, 60).flatmap(lambda samples: st.tuples(st.just(samples), st.integers(1, samples)))


def rows_of(steps: EpochSteps, step: int) -> list[tuple[int, int]]:
    return [(epoch, row) for epoch, first, stop in steps.pieces(step) for row in range(first, stop)]


@given(SIZES, st.integers(1, 5), st.booleans())
def test_steps_take_the_rows_of_all_epochs_in_order(sizes: tuple[int, int], epochs: int, carry: bool) -> None:
    samples, batch = sizes
    steps = EpochSteps(samples, batch, carry)
    kept = samples if carry else samples - samples % batch
    expected = [(epoch, row) for epoch in range(epochs) for row in range(kept)]
    found = [rows_of(steps, step) for step in range(steps.total(epochs))]
    assert all(len(rows) == batch for rows in found)
    flat = [row for rows in found for row in rows]
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < batch


@given(SIZES, st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_an_epoch_ends_with_the_step_that_takes_its_last_row(
    sizes: tuple[int, int], epochs: int, every: int, carry: bool
) -> None:
    samples, batch = sizes
    steps = EpochSteps(samples, batch, carry)
    last_row = samples - 1 if carry else samples - samples % batch - 1
    done = 0
    for step in range(steps.total(epochs)):
        ended = [epoch for epoch, row in rows_of(steps, step) if row == last_row]
        done += len(ended)
        assert steps.epochs_done(step + 1) == done
        assert steps.ends_epoch(step + 1, every) == any((epoch + 1) % every == 0 for epoch in ended)


def test_steps_of_small_epochs_are_those_counted_by_hand() -> None:
    carry, drop = EpochSteps(10, 4, carry=True), EpochSteps(10, 4, carry=False)
    assert [carry.pieces(step) for step in (1, 2, 4)] == [[(0, 4, 8)], [(0, 8, 10), (1, 0, 2)], [(1, 6, 10)]]
    assert [drop.pieces(step) for step in (1, 2)] == [[(0, 4, 8)], [(1, 0, 4)]]
    assert (carry.total(3), drop.total(3)) == (7, 6)
    assert (carry.per_epoch, drop.per_epoch) == (2.5, 2)
    assert [step for step in range(1, 8) if carry.ends_epoch(step, 1)] == [3, 5]
    assert [step for step in range(1, 8) if carry.ends_epoch(step, 2)] == [5]


@pytest.mark.parametrize("batch", [6, 10])
def test_carry_changes_nothing_when_the_batch_divides_the_epoch(batch: int) -> None:
    carry, drop = EpochSteps(30, batch, carry=True), EpochSteps(30, batch, carry=False)
    assert [carry.pieces(step) for step in range(12)] == [drop.pieces(step) for step in range(12)]
    assert (carry.total(7), carry.per_epoch) == (drop.total(7), drop.per_epoch)
