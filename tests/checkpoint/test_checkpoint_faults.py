"""What goes wrong with disks: a save that fails is one clear error on all ranks alike, and harms no other checkpoint."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.kills import check_state, small_run, write_state
from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.errors import CheckpointError
from tests.ranks import run_on_ranks
from tests.small_disk import fill


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    with on_main(lambda: fill(directory.parent / "filler"), (directory.parent / "filler").unlink):
        yield


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    disk = str(directory.parent)
    with on_main(
        lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=True),
        lambda: subprocess.run(["mount", "-o", "remount,rw", disk], check=True),
    ):
        yield


@contextmanager
def vanished(directory: Path) -> Iterator[None]:
    elsewhere = directory.with_name("elsewhere")
    with on_main(lambda: directory.rename(elsewhere), lambda: elsewhere.rename(directory)):
        yield


@contextmanager
def limited_on_the_last_rank(directory: Path) -> Iterator[None]:
    """There, no file may grow above 2,000 bytes; the others can write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def on_main(do: Callable[[], object], undo: Callable[[], object]) -> Iterator[None]:
    """Something done on rank 0 while all ranks are in the block."""
    for action in (do, undo):
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()
        if action is do:
            yield


FAULTS: dict[str, tuple[Callable[[Path], AbstractContextManager[None]], str]] = {
    "full disk": (full_disk, "No space left on device"),
    "read-only disk": (read_only, "Read-only file system"),
    "vanished directory": (vanished, "No such file or directory"),
    "too large a file on one rank": (limited_on_the_last_rank, "File too large"),
}


@dataclass
class Outcome:
    """What a rank saw.

    Attributes:
        message: of the error; None where the run went on.
        failed_saves: in the metrics, after the fault.
        newest: names of the newest valid checkpoint: after the fault, and after one more save.
        names: of all that is in the directory at the end.
    """

    message: str | None
    failed_saves: float
    newest: tuple[str, str]
    names: list[str]


def saves_around_a_fault(directory: Path, saving: CheckpointConfig, fault: str) -> Outcome:
    backend, topology, checkpoint = small_run(directory, saving)

    def save(*, wait: bool) -> None:
        topology.step()
        write_state(backend, topology.steps)
        checkpoint.save(topology.steps)
        if wait:
            checkpoint.wait()

    def newest() -> str:
        path = checkpoint.newest_valid()
        assert path is not None
        return path.name

    message = None
    save(wait=True)
    assert checkpoint.metrics()["failed_saves"] == 0
    with FAULTS[fault][0](directory):
        try:
            save(wait=False)
            metrics = checkpoint.metrics()
            while not metrics["failed_saves"] and "checkpoint_seconds" not in metrics:
                time.sleep(0.01)
                metrics = checkpoint.metrics()
        except CheckpointError as error:
            message = str(error)
    failed, after_fault = checkpoint.failed_saves, newest()
    assert not list(directory.glob("*.partial")), "what was begun is removed"
    dist.barrier()
    save(wait=True)
    outcome = Outcome(message, failed, (after_fault, newest()), sorted(path.name for path in directory.iterdir()))
    _, loaded_topology, loaded = small_run(directory, saving)
    assert loaded.load_newest() == loaded_topology.steps == 3
    check_state(loaded.run.backend, 3)
    for each in (checkpoint, loaded):
        each.close()
    return outcome


SAVING = [(("continue", True), ("stop", False)), (("continue", False), ("stop", True))]
CASES = [(fault, *saving) for fault, savings in zip(FAULTS, cycle(SAVING), strict=False) for saving in savings]
"""Each pair of fault, ``on_error`` and ``background``."""


@pytest.mark.parametrize(("fault", "on_error", "background"), CASES)
def test_a_failed_save_is_one_error_on_all_ranks_and_harms_no_other_checkpoint(
    small_disk: Path, fault: str, on_error: str, background: bool
) -> None:
    saving = CheckpointConfig(background=background, on_error=on_error)  # type: ignore[arg-type]
    outcomes = run_on_ranks(2, saves_around_a_fault, small_disk / "checkpoints", saving, fault)
    reason = FAULTS[fault][1]
    for outcome in outcomes:
        assert outcome.failed_saves == 1
        assert outcome.newest == ("step-00000001", "step-00000003")
        assert outcome.names == ["owner", "step-00000001", "step-00000003"]
        if on_error == "continue":
            assert outcome.message is None
        else:
            assert outcome.message is not None
            assert outcome.message.startswith(f"can't save {small_disk}/checkpoints/step-00000002: ")
            assert reason in outcome.message
            assert outcome.message.endswith("; free or mount the disk")
            assert "\n" not in outcome.message
    assert outcomes[0] == outcomes[1]
