"""Which ranks are gone, and which hold up the others, from their beats alone."""

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
def recorded() -> Heartbeats:
    """Three ranks, whose last new beats came at 0, 5 and 10 s; ranks 0 and 2 entered their phase at 0 s, rank 1 at 5 s."""
    beats = Heartbeats()
    for rank in range(3):
        beats.record(beat(rank, 1, 4), 0.0)
    beats.record(beat(0, 1, 4), 10.0)
    for now in (5.0, 10.0):
        beats.record(beat(1, 2, 5), now)
    beats.record(beat(2, 2, 4), 5.0)
    beats.record(beat(2, 3, 4), 10.0)
    return beats


def test_beat_is_the_same_after_encoding_and_decoding() -> None:
    assert Beat.decode(beat(3, 9, 2, finished=True).encode().encode()) == beat(3, 9, 2, finished=True)


def test_rank_is_silent_while_its_sequence_stands_still(recorded: Heartbeats) -> None:
    assert ranks_of(recorded.silent(10.0, 10.0)) == []
    assert ranks_of(recorded.silent(10.1, 10.0)) == [0]
    assert ranks_of(recorded.silent(10.1, 5.0)) == [0, 1]


def test_ranks_with_the_least_progress_are_stuck_after_the_limit(recorded: Heartbeats) -> None:
    assert ranks_of(recorded.stuck(10.1, 10.0)) == [0, 2], "rank 1 is a phase ahead, and waits"
    assert ranks_of(recorded.stuck(10.0, 10.0)) == []
    recorded.record(beat(0, 2, 5), 11.0)
    recorded.record(beat(2, 4, 6), 11.0)
    assert ranks_of(recorded.stuck(15.1, 10.0)) == [], "rank 1 is behind since 5 s, but rank 0 came to its phase at 11 s"
    assert ranks_of(recorded.stuck(21.1, 10.0)) == [0, 1], "either of them may be the one that hangs"
    recorded.record(beat(0, 3, 6), 22.0)
    assert ranks_of(recorded.stuck(22.1, 10.0)) == [1]


def test_finished_rank_is_neither_silent_nor_stuck(recorded: Heartbeats) -> None:
    for rank in range(2):
        recorded.record(beat(rank, 9, 4, finished=True), 20.0)
    assert ranks_of(recorded.silent(99.0, 10.0)) == [2]
    assert ranks_of(recorded.stuck(99.0, 10.0)) == [2]


def test_restart_counts_all_beats_as_new(recorded: Heartbeats) -> None:
    recorded.restart(100.0)
    assert recorded.silent(110.0, 10.0) == recorded.stuck(110.0, 10.0) == []
    assert ranks_of(recorded.silent(110.1, 10.0)) == [0, 1, 2]


def test_phases_are_timed_once_all_ranks_have_done_a_step(recorded: Heartbeats) -> None:
    assert recorded.timed
    recorded.record(beat(1, 3, 4, timed=False), 11.0)
    assert not recorded.timed


def test_name_ranks_counts_those_beyond_eight() -> None:
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
