"""Who is gone, and who holds up the others, from beats alone."""

from __future__ import annotations

import pytest

from svite_scale.runtime.activity import Activity
from svite_scale.runtime.heartbeats import Beat, Heartbeats, name_ranks


def beat(rank: int, sequence: int, progress: int, *, finished: bool = False, timed: bool = True) -> Beat:
    return Beat(
        rank=rank,
        host=f"node-{rank}",
        pid=rank,
        sequence=sequence,
        step=7,
        phase="compute",
        progress=progress,
        timed=timed,
        finished=finished,
    )


def ranks_of(beats: list[Beat]) -> list[int]:
    return [one.rank for one in beats]


@pytest.fixture
def heard() -> Heartbeats:
    """Three ranks, last heard at 0, 5 and 10 s; all in the same phase, which rank 2 has entered at 0 s."""
    beats = Heartbeats()
    for rank in range(3):
        beats.see(beat(rank, 1, 4), 0.0)
    beats.see(beat(0, 1, 4), 10.0)
    for now in (5.0, 10.0):
        beats.see(beat(1, 2, 5), now)
    beats.see(beat(2, 2, 4), 5.0)
    beats.see(beat(2, 3, 4), 10.0)
    return beats


def test_a_beat_survives_the_store() -> None:
    assert Beat.decode(beat(3, 9, 2, finished=True).encode().encode()) == beat(3, 9, 2, finished=True)


def test_a_rank_is_silent_while_its_sequence_stands(heard: Heartbeats) -> None:
    assert ranks_of(heard.silent(10.0, 10.0)) == []
    assert ranks_of(heard.silent(10.1, 10.0)) == [0]
    assert ranks_of(heard.silent(10.1, 5.0)) == [0, 1]


def test_those_with_least_progress_hold_up_the_others(heard: Heartbeats) -> None:
    assert ranks_of(heard.stuck(10.1, 10.0)) == [0, 2], "rank 1 is a phase ahead, and waits"
    assert ranks_of(heard.stuck(10.0, 10.0)) == []
    heard.see(beat(0, 2, 5), 11.0)
    heard.see(beat(2, 4, 6), 11.0)
    assert ranks_of(heard.stuck(15.1, 10.0)) == [1], "now it is behind, since 5 s"
    assert ranks_of(heard.stuck(15.0, 10.0)) == []


def test_who_has_finished_is_neither(heard: Heartbeats) -> None:
    for rank in range(2):
        heard.see(beat(rank, 9, 4, finished=True), 20.0)
    assert ranks_of(heard.silent(99.0, 10.0)) == [2]
    assert ranks_of(heard.stuck(99.0, 10.0)) == [2]


def test_after_a_pause_all_count_as_just_heard(heard: Heartbeats) -> None:
    heard.restart(100.0)
    assert heard.silent(110.0, 10.0) == heard.stuck(110.0, 10.0) == []
    assert ranks_of(heard.silent(110.1, 10.0)) == [0, 1, 2]


def test_phases_are_timed_once_all_ranks_have_done_a_step(heard: Heartbeats) -> None:
    assert heard.timed
    heard.see(beat(1, 3, 4, timed=False), 11.0)
    assert not heard.timed


def test_many_ranks_are_counted_not_named() -> None:
    assert name_ranks([beat(1, 1, 1), beat(0, 1, 1)]) == (
        "rank 0 on node-0 (after step 7, compute), rank 1 on node-1 (after step 7, compute)"
    )
    assert name_ranks(beat(rank, 1, 1) for rank in range(10)).endswith("rank 7 on node-7 (after step 7, compute) and 2 more")


def test_activity_counts_each_phase_as_progress_and_is_timed_after_the_first_step() -> None:
    activity = Activity()
    assert (activity.phase, activity.timed) == ("starting", False)
    seen = []
    for _ in range(2):
        activity.enter("evaluation")
        seen.append((activity.phase, activity.progress))
    assert seen == [("evaluation", 1), ("evaluation", 2)]
    activity.end_step(3)
    assert (activity.step, activity.timed) == (3, True)
