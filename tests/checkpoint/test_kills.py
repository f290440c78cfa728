"""Ranks killed at random instants of a save lose nothing valid (benchmarks/kills.py tries as many instants as one likes)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kills import kill_at_random

INSTANTS = 15


def test_a_kill_at_any_instant_of_a_save_leaves_the_previous_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    outcome = kill_at_random(INSTANTS, tmp_path)
    assert outcome.during_save == INSTANTS
    assert outcome.loaded_previous + outcome.loaded_new == INSTANTS
    assert len(list((tmp_path / "checkpoints").glob("step-*[0-9]"))) <= 3, "old ones are removed all the while"
