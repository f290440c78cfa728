"""One directory of checkpoints: who saves there, and what is never removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from svite_scale.train.checkpoint.directory import CheckpointDirectory
from svite_scale.train.checkpoint.manifest import digest, problem_of


def write(partial: Path, text: str) -> Path:
    (partial / "data").write_text(text)
    return partial


def save(directory: CheckpointDirectory, step: int, text: str = "content") -> Path:
    partial = write(directory.begin(step, may_create=True), text)
    return directory.publish(partial, {"data": digest(partial / "data")})


def test_of_two_starts_of_a_run_the_later_one_saves(tmp_path: Path) -> None:
    """As when a scheduler starts a job again whose processes still run on a machine that it has lost."""
    old, new = CheckpointDirectory(tmp_path, keep_last=1), CheckpointDirectory(tmp_path, keep_last=1)
    save(old, 10)
    late = old.begin(20, may_create=False)
    theirs = new.begin(20, may_create=False)
    assert theirs != late
    saved = new.publish(write(theirs, "new"), {"data": digest(theirs / "data")})
    with pytest.raises(FileNotFoundError):
        write(late, "old")
    assert problem_of(saved) is None
    with pytest.raises(OSError, match=r"another start of this run saves here now \(process \d+ on .*\); end one of the two"):
        old.begin(30, may_create=False)
    save(new, 30)
    assert [path.name for path in new.named()] == ["step-00000030"]


def test_what_was_published_is_not_removed_for_older_steps(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep_last=2)
    for step in (100, 200, 300):
        save(directory, step)
    saved = save(CheckpointDirectory(tmp_path, keep_last=2), 10)
    assert problem_of(saved) is None
    assert (tmp_path / "latest").read_text() == "step-00000010\n"


def test_one_that_can_not_be_removed_hinders_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = CheckpointDirectory(tmp_path, keep_last=1)
    save(directory, 1)
    with patch.object(shutil, "rmtree", side_effect=OSError(16, "Device or resource busy")):
        for step in (2, 3):
            save(directory, step)
    assert [path.name for path in directory.named()] == ["step-00000003"]
    assert all("can't remove the old checkpoint" in line for line in caplog.messages)
    save(directory, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "owner", "step-00000004"]


def test_a_directory_that_can_not_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    assert CheckpointDirectory(tmp_path / "nowhere").named() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        CheckpointDirectory(tmp_path / "file").named()
