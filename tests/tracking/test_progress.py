"""Progress on a terminal, in a file, and on ranks that are silent."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from io import StringIO

import pytest

from svite_scale.tracking import progress as module
from svite_scale.tracking.progress import Progress, in_hours, track


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_progress_prints_a_plain_line_every_30_seconds_and_at_the_end_in_a_file(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", 3000, "steps", done=1000) as progress:
        for _ in range(100):
            clock.now += 0.5
            progress.show({"loss": 1.23456} if clock.now > 102 else {"loss": 9.0, "test": 0.5})
            progress.advance()
        assert capsys.readouterr().err == "train: 1,060 of 3,000 steps (35%), 16:10 left, 2 steps/s, loss 1.235, test 0.5\n"
        progress.write("above")
        progress.rewind(1000)
        clock.now += 50.0
        progress.advance(2000)
    assert capsys.readouterr().err.splitlines() == [
        "above",
        "train: 3,000 of 3,000 steps (100%), 1:40 in all, 21 steps/s, loss 1.235, test 0.5",
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("verify", 3, "shards", done=1) as progress:
        progress.show({"loss": 0.5})
        progress.advance()
        progress.write("a line above the bar")
        progress.advance()
    progress.write("a line after the bar")
    shown = terminal.getvalue()
    assert re.search(r"\rverify:  33%.*1/3 ", shown)
    assert re.search(r"\rverify: 100%.*3/3 .*loss 0\.5", shown)
    assert shown.endswith("\na line after the bar\n")
    assert "\ra line above the bar\n" in re.sub(r"\r +\r", "\r", shown)


def test_progress_shows_nothing_when_it_is_not_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("train", 2, "steps", enabled=False) as progress:
        progress.advance(2)
        progress.rewind(0)
        progress.show({"loss": 1.0})
        progress.write("line")
    assert not terminal.getvalue()


def test_progress_says_where_the_work_stopped_when_it_fails(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Progress("train", 4, "steps") as progress:  # noqa: PT012
        clock.now += 2.0
        progress.advance()
        raise ZeroDivisionError
    progress.close()
    assert capsys.readouterr().err == "train: 1 of 4 steps (25%), 0:06 left, 0.5 steps/s\n"


def test_track_yields_the_items_and_counts_each_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)

    def items() -> Iterator[str]:
        yield from "abc"

    seen = []
    for item in track(items(), "index", 3, "shards"):
        seen.append((item, capsys.readouterr().err.count("shards (")))
    assert seen == [("a", 0), ("b", 1), ("c", 1)]
    assert capsys.readouterr().err.startswith("index: 3 of 3 shards (100%), ")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (100_000, "27:46:40")])
def test_in_hours_gives_hours_from_one_hour_on(seconds: float, text: str) -> None:
    assert in_hours(seconds) == text
