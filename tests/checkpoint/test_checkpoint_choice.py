"""Which checkpoint a run goes on from, and which are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.kills import SAVING, STEPS_PER_EPOCH, check_state, small_run, write_state
from svite_scale.checkpoint.compatibility import versions
from svite_scale.config.schema import CheckpointConfig
from svite_scale.errors import CheckpointError
from tests.ranks import run_on_ranks
from tests.runs import Lines


def save_steps(directory: Path, saving: CheckpointConfig, steps: int) -> list[str]:
    """Goes on from the newest checkpoint, if there is one; names of all that is there at the end."""
    backend, topology, checkpoint = small_run(directory, saving)
    if checkpoint.newest_valid() is not None:
        check_state(backend, checkpoint.load_newest())
    for _ in range(steps):
        topology.step()
        write_state(backend, topology.steps)
        checkpoint.save(topology.steps, wait=True)
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


def test_checkpoint_of_another_step_than_its_name_is_refused(tmp_path: Path) -> None:
    run_on_ranks(1, save_steps, tmp_path / "checkpoints", SAVING, 2)
    renamed = (tmp_path / "checkpoints" / "step-00000002").rename(tmp_path / "checkpoints" / "step-00000007")
    (found,) = run_on_ranks(1, load, tmp_path / "checkpoints")
    assert found.message == f"{renamed} holds the state after step 2, not 7; restore its name"


def another_size(path: Path) -> None:
    content = json.loads(path.read_text())
    content["files"]["run.json"]["size"] += 1
    path.write_text(json.dumps(content))


DATA = "__1_0.distcp"
KEEP_ALL = CheckpointConfig(keep_last=None)
TORN: dict[str, tuple[str, Callable[[Path], object], str]] = {
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


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_checkpoint_is_named_skipped_and_left_in_place(tmp_path: Path, torn: str) -> None:
    directory = tmp_path / "checkpoints"
    name, damage, problem = TORN[torn]
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
    # Going on, the same step is saved beside it, and is the newest from then on.
    names = run_on_ranks(2, save_steps, directory, KEEP_ALL, 1)[0]
    assert names == ["latest", "owner", "step-00000001", "step-00000002", "step-00000002-2"]
    assert (directory / "latest").read_text() == "step-00000002-2\n"
    assert [found.step for found in run_on_ranks(2, load, directory)] == [2, 2]
    assert run_on_ranks(1, load, directory)[0].step == 2, "on another number of ranks"


def test_without_a_valid_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(2, save_steps, directory, SAVING, 1)
    flip(directory / "step-00000001" / DATA)
    for found in run_on_ranks(2, load, directory):
        assert found.step is None
        assert found.message == f"{directory} holds no checkpoint that is whole; restore one, or start a new run"


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
def test_which_are_kept(tmp_path: Path, saving: CheckpointConfig, kept: list[int]) -> None:
    assert STEPS_PER_EPOCH == 2
    names = run_on_ranks(1, save_steps, tmp_path / "checkpoints", saving, 7)[0]
    assert names == ["latest", "owner", *(f"step-{step:08d}" for step in kept)]


def test_torn_ones_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(1, save_steps, directory, SAVING, 2)
    (directory / "step-00000002" / "manifest.json").unlink()
    names = run_on_ranks(1, save_steps, directory, SAVING, 2)[0]
    assert names == ["latest", "owner", "step-00000002", "step-00000002-2", "step-00000003"]


def test_what_an_interrupted_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_on_ranks(1, save_steps, directory, SAVING, 1)
    (directory / "step-00000001").rename(directory / "step-00000007.partial")
    (directory / "latest.new").write_text("step-00000007")
    assert run_on_ranks(1, load, directory)[0].step is None
    assert run_on_ranks(1, save_steps, directory, SAVING, 1)[0] == ["latest", "owner", "step-00000001"]


def test_other_versions_are_told_in_one_line(tmp_path: Path) -> None:
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


def rewrite_manifest(path: Path) -> None:
    from hashlib import sha256

    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()} for file in path.iterdir()
    }
    (path / "manifest.json").write_text(json.dumps({"files": files}))
