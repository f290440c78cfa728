"""Lines of JSON that are written at once, wait where they must, and are cut where a run goes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from svite_scale.tracking.metric_lines import MetricLines
from tests.runs import json_lines
from tests.small_disk import fill


def test_lines_wait_until_a_full_disk_has_room(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = MetricLines(small_disk / "metrics.jsonl")
    lines.append({"step": 1})
    fill(small_disk / "filler")
    long = "x" * 10_000
    for step in (2, 3):
        lines.append({"step": step, "text": long})
        assert json_lines(lines.path) == [{"step": 1}], "no part of a line"
    assert len(caplog.messages) == 1
    assert "metrics.jsonl doesn't take lines ([Errno 28] No space left on device); they wait" in caplog.messages[0]
    (small_disk / "filler").unlink()
    lines.append({"step": 4})
    assert [line["step"] for line in json_lines(lines.path)] == [1, 2, 3, 4]
    lines.close()
    assert len(caplog.messages) == 1


def test_close_warns_of_lines_that_are_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = MetricLines(tmp_path / "gone" / "metrics.jsonl")
    for step in (1, 2):
        lines.append({"step": step})
    lines.close()
    assert caplog.messages[-1].startswith(f"{lines.path} lacks its last 2 lines: [Errno 2]")


@pytest.mark.parametrize("rest", ["", '{"step": 3, "masks": {"a": "ff"}', '{"step": 3', "{}", "7", "\x00\x00"])
def test_cut_leaves_complete_lines_up_to_a_step(tmp_path: Path, rest: str) -> None:
    lines = MetricLines(tmp_path / "topology.jsonl")
    kept = [{"step": step, "masks": {"a": "ff"}} for step in (0, 2, 3)]
    for line in (*kept, {"step": 4, "masks": {}}):
        lines.append(line)
    with lines.path.open("a") as file:
        file.write(rest)
    lines.cut(3)
    assert json_lines(lines.path) == kept
    lines.append({"step": 5})
    assert json_lines(lines.path)[-1] == {"step": 5}


def test_cut_removes_waiting_lines_too(tmp_path: Path) -> None:
    lines = MetricLines(tmp_path / "folder" / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.append({"step": step})
    lines.cut(2)
    lines.path.parent.mkdir()
    lines.close()
    assert json_lines(lines.path) == [{"step": 1}, {"step": 2}]


def test_cut_leaves_the_file_unchanged_when_the_disk_is_full(small_disk: Path) -> None:
    lines = MetricLines(small_disk / "metrics.jsonl")
    for step in range(1000):
        lines.append({"step": step, "text": "x" * 100})
    before = lines.path.read_bytes()
    fill(small_disk / "filler")
    with pytest.raises(OSError, match="No space left on device"):
        lines.cut(900)
    assert lines.path.read_bytes() == before
