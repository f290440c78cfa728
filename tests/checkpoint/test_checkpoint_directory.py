"""One directory of checkpoints: who saves there, and what is never removed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.kills import check_state, small_run, write_state
from svite_scale.checkpoint import save as writing
from svite_scale.checkpoint.directory import CheckpointDirectory
from svite_scale.checkpoint.manifest import FileDigest, digest, problem_of
from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.errors import CheckpointError
from tests.ranks import run_on_ranks


def write(partial: Path, text: str) -> Path:
    (partial / "data").write_text(text)
    return partial


def save(directory: CheckpointDirectory, step: int) -> Path:
    directory.claim()
    partial = write(directory.begin(step), "content")
    return directory.publish(partial, {"data": digest(partial / "data")})


def test_the_later_of_two_starts_of_a_run_owns_the_directory(tmp_path: Path) -> None:
    old, new = CheckpointDirectory(tmp_path), CheckpointDirectory(tmp_path)
    save(old, 10)
    late = old.begin(20)
    save(new, 20)
    other = old.other_owner()
    assert other is not None
    assert re.fullmatch(r"process \d+ on .*", other)
    with pytest.raises(OSError, match=f"^{re.escape(other)} owns it now$"):
        old.claim()
    with pytest.raises(FileNotFoundError):
        write(late, "old")
    save(new, 30)
    assert [path.name for path in new.named()] == ["step-00000030", "step-00000020", "step-00000010"]


def test_a_start_publishes_nothing_when_it_loses_the_directory_during_a_save(tmp_path: Path) -> None:
    """As when a scheduler starts a job again whose processes still run on a machine that it has lost."""
    (said,) = run_on_ranks(1, takes_over, tmp_path / "checkpoints")
    lost = r"process \d+ on .* has begun to save this run here; end one of the two"
    assert re.fullmatch(rf"can't save {tmp_path}/checkpoints/step-00000002: {lost}", said)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["owner", "step-00000002"]


def takes_over(directory: Path) -> str:
    saving = CheckpointConfig(keep_last=1, on_error="stop", background=False)
    starts = [small_run(directory, saving) for _ in range(2)]

    def save(start: int) -> None:
        backend, topology, checkpoint = starts[start]
        topology.step()
        write_state(backend, topology.steps)
        checkpoint.save(topology.steps)

    finish, taken = writing._finish_files, []

    def finish_late(*arguments: Any) -> dict[str, FileDigest]:
        if not taken:
            taken.append(True)
            for _ in range(2):
                save(1)
        return finish(*arguments)

    save(0)
    with patch.object(writing, "_finish_files", finish_late), pytest.raises(CheckpointError) as caught:
        save(0)
    backend, topology, checkpoint = starts[1]
    assert checkpoint.load_newest() == topology.steps == 2
    check_state(backend, 2)
    for _, _, each in starts:
        each.close()
    return str(caught.value)


def test_a_published_checkpoint_is_kept_when_others_have_later_steps(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep_last=2)
    for step in (100, 200, 300):
        save(directory, step)
    saved = save(CheckpointDirectory(tmp_path, keep_last=2), 10)
    assert problem_of(saved) is None
    assert [path.name for path in directory.named()] == ["step-00000300", "step-00000200", "step-00000010"]


def test_a_save_succeeds_when_an_old_checkpoint_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = CheckpointDirectory(tmp_path, keep_last=1)
    save(directory, 1)
    with patch.object(shutil, "rmtree", side_effect=OSError(16, "Device or resource busy")):
        for step in (2, 3):
            save(directory, step)
    assert [path.name for path in directory.named()] == ["step-00000003"]
    assert all(line.startswith("can't remove ") for line in caplog.messages)
    save(directory, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owner", "step-00000004"]


def save_one(directory: Path) -> None:
    backend, topology, checkpoint = small_run(directory)
    topology.step()
    write_state(backend, topology.steps)
    checkpoint.save(topology.steps)
    checkpoint.close()


def save_after_the_directory_is_gone(directory: Path) -> str:
    _, topology, checkpoint = small_run(directory)
    checkpoint.load_newest()
    directory.rename(directory.with_name("elsewhere"))
    topology.step()
    checkpoint.save(topology.steps)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.wait()
    checkpoint.close()
    return str(caught.value)


def test_a_resumed_run_does_not_make_its_directory_again_when_it_is_gone(tmp_path: Path) -> None:
    """A disk that isn't mounted any more would leave the checkpoints in its place."""
    run_on_ranks(1, save_one, tmp_path / "checkpoints")
    (message,) = run_on_ranks(1, save_after_the_directory_is_gone, tmp_path / "checkpoints")
    assert message.startswith(f"can't save {tmp_path}/checkpoints/step-00000002: [Errno 2] No such file or directory")
    assert not (tmp_path / "checkpoints").exists()


def test_named_raises_when_the_directory_cannot_be_listed(tmp_path: Path) -> None:
    assert CheckpointDirectory(tmp_path / "nowhere").named() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        CheckpointDirectory(tmp_path / "file").named()
