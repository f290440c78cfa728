"""Which checkpoint a run resumes from, and which are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.kills import SAVING, STEPS_PER_EPOCH, check_state, small_run, write_state
from svite_scale.checkpoint.compatibility import versions
from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.errors import CheckpointError
from tests.ranks import run_on_ranks
from tests.runs import Lines


def save_steps(directory: Path, saving: CheckpointConfig, steps: int) -> list[str]:
    """Resumes from the newest checkpoint, if there is one, and saves some steps; returns the names of all files then."""
    backend, topology, checkpoint = small_run(directory, saving)
    if checkpoint.newest_valid() is not None:
        check_state(backend, checkpoint.load_newest())
    for _ in range(steps):
        topology.step()
        write_state(backend, topology.steps)
        checkpoint.save(topology.steps)
        checkpoint.wait()
    checkpoint.close()
    return sorted(path.name for path in directory.iterdir())


@dataclass
class Loaded:
    """What a rank found.

    Attributes:
        step: that was loaded; None where there was nothing to load.
        message: of the error then.
        lines: that were logged.
    """

    step: int | None = None
    message: str = ""
    lines: list[str] = field(default_factory=list)


def load(directory: Path) -> Loaded:
    logger, said = logging.getLogger("svite_scale"), Lines()
    found = Loaded(lines=said.lines)
    logger.addHandler(said)
    backend, topology, checkpoint = small_run(directory)
    try:
        found.step = checkpoint.load_newest()
        assert topology.steps == found.step
        check_state(backend, found.step)
    except CheckpointError as error:
        found.message = str(error)
    finally:
        logger.removeHandler(said)
        checkpoint.close()
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def another_size(path: Path) -> None:
    content = json.loads(path.read_text())
    content["files"]["run.json"]["size"] += 1
    path.write_text(json.dumps(content))


DATA = "__1_0.distcp"
KEEP_ALL = CheckpointConfig(keep_last=None)
DAMAGED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no manifest": ("manifest.json", Path.unlink, "it has no manifest.json"),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "its manifest.json is damaged"),
    "another manifest": ("manifest.json", lambda path: path.write_text('{"files": [1]}'), "its manifest.json is damaged"),
    "another size": ("manifest.json", another_size, "run.json has "),
    "short tensors": (DATA, cut, f"{DATA} has "),
    "long tensors": (DATA, lambda path: path.write_bytes(path.read_bytes() + b"\0"), f"{DATA} has "),
    "flipped tensors": (DATA, flip, f"the checksum of {DATA} is wrong"),
    "no tensors": (DATA, Path.unlink, f"{DATA} is missing"),
    "flipped index": (".metadata", flip, "the checksum of .metadata is wrong"),
    "flipped state": ("run.json", flip, "the checksum of run.json is wrong"),
    "no index": (".metadata", Path.unlink, ".metadata is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_an_incomplete_or_corrupt_checkpoint_is_named_skipped_and_left_in_place(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "checkpoints"
    name, damage, problem = DAMAGED[kind]
    run_on_ranks(2, save_steps, directory, KEEP_ALL, 2)
    newest = directory / "step-00000002"
    damage(newest / name)
    left = {path.name: path.read_bytes() for path in newest.iterdir()}
    main, other = run_on_ranks(2, load, directory)
    assert (main.step, main.message) == (other.step, other.message) == (1, "")
    assert len(main.lines) == 1
    assert main.lines[0].startswith(f"checkpoint {newest} is skipped: {problem}")
    assert other.lines == []
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == left
    # When the resumed run comes to that step again, it saves it beside, and that is the newest from then on.
    names = run_on_ranks(2, save_steps, directory, KEEP_ALL, 1)[0]
    assert names == ["owner", "step-00000001", "step-00000002", "step-00000002-2"]
    assert [found.step for found in run_on_ranks(2, load, directory)] == [2, 2]
    assert run_on_ranks(1, load, directory)[0].step == 2, "on another number of ranks"


def test_loading_fails_when_no_checkpoint_is_valid(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(2, save_steps, directory, SAVING, 1)
    flip(directory / "step-00000001" / DATA)
    for found in run_on_ranks(2, load, directory):
        assert found.step is None
        assert found.message == f"{directory} holds no checkpoint that is valid; restore one, or start a new run"


@pytest.mark.parametrize(
    ("saving", "kept"),
    [
        (CheckpointConfig(keep_last=None), [1, 2, 3, 4, 5, 6, 7]),
        (CheckpointConfig(keep_last=1), [7]),
        (CheckpointConfig(keep_last=3), [5, 6, 7]),
        (CheckpointConfig(keep_last=1, keep_every_epochs=1), [2, 4, 6, 7]),
        (CheckpointConfig(keep_last=2, keep_every_epochs=2), [4, 6, 7]),
    ],
)
def test_the_newest_and_those_of_some_epochs_are_kept(tmp_path: Path, saving: CheckpointConfig, kept: list[int]) -> None:
    assert STEPS_PER_EPOCH == 2
    names = run_on_ranks(1, save_steps, tmp_path / "checkpoints", saving, 7)[0]
    assert names == ["owner", *(f"step-{step:08d}" for step in kept)]


def test_incomplete_checkpoints_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(1, save_steps, directory, SAVING, 2)
    (directory / "step-00000002" / "manifest.json").unlink()
    names = run_on_ranks(1, save_steps, directory, SAVING, 2)[0]
    assert names == ["owner", "step-00000002", "step-00000002-2", "step-00000003"]


def test_the_next_save_removes_what_an_interrupted_one_or_an_older_version_left(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(1, save_steps, directory, SAVING, 1)
    (directory / "step-00000001").rename(directory / "step-00000007.partial")
    (directory / "latest").write_text("step-00000007")
    assert run_on_ranks(1, load, directory)[0].step is None
    assert run_on_ranks(1, save_steps, directory, SAVING, 1)[0] == ["owner", "step-00000001"]


def test_a_load_warns_in_one_line_when_other_versions_saved(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(1, save_steps, directory, SAVING, 1)
    path = directory / "step-00000001"
    state = json.loads((path / "run.json").read_text())
    assert state["versions"] == versions()
    assert set(versions()) == {"python", "svite_scale", "torch", "deepspeed", "timm"}
    assert run_on_ranks(1, load, directory)[0].lines == []
    state["versions"] |= {"torch": "1.0", "timm": None}
    (path / "run.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    rewrite_manifest(path)
    lines = run_on_ranks(1, load, directory)[0].lines
    now = versions()
    expected = f"torch 1.0 (now {now['torch']}), timm None (now {now['timm']})"
    assert lines == [f"checkpoint {path} was saved by {expected}"]


def test_a_checkpoint_of_an_older_version_is_loaded_without_a_step_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000001"
    run_on_ranks(1, save_steps, path.parent, SAVING, 1)
    state = json.loads((path / "run.json").read_text())
    assert state.pop("step") == state["topology"]["steps"] == 1
    (path / "run.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    rewrite_manifest(path)
    assert run_on_ranks(1, load, path.parent)[0].step == 1


def rewrite_manifest(path: Path) -> None:
    from hashlib import sha256

    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()} for file in path.iterdir()
    }
    (path / "manifest.json").write_text(json.dumps({"files": files}))
