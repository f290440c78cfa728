"""``launch/train.py`` with a fault on the last rank. ``FAULT`` in the environment names the fault.

Most faults strike once, when the rank enters a phase after the third step.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

AFTER_STEP = 3
PHASES = {"evaluation": "evaluation", "saving": "checkpoint"}
"""The phase in which a fault strikes; by default ``compute``."""

SMALL_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=512k none /dev/shm && exec "$@"', "sh")
"""Runs a command with a small /dev/shm of its own, for the fault ``shm``. Needs root."""


class Struck:
    """True once the fault has struck."""

    now = False


def strike(fault: str, shards: Path) -> None:
    """Does what the fault does on the main thread."""
    if fault == "unreadable":
        for path in shards.glob("train-*.tar"):
            path.write_bytes(b"")
    elif fault == "killed":
        os.kill(next(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)
    elif fault == "shm":
        fill_shm()
    elif fault in ("evaluation", "saving", "closing"):
        mistake()


def fill_shm() -> None:
    """Fills /dev/shm to the last byte. Refuses to fill a large one."""
    disk = os.statvfs("/dev/shm")
    assert disk.f_blocks * disk.f_frsize <= 2**20, "this is everybody's"
    with Path("/dev/shm/full").open("wb", buffering=0) as file:
        for size in (2**12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def mistake(*_: Any, **__: Any) -> NoReturn:
    raise KeyError("a mistake of ours")


def hang(*_: Any, **__: Any) -> None:
    while True:
        time.sleep(1)


class OutOfMemory(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def once_struck(then: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls ``before`` until the fault strikes, and ``then`` afterwards."""
    return lambda *args, **kwargs: (then if Struck.now else before)(*args, **kwargs)


def inject(fault: str, shards: Path) -> None:
    """Puts a fault in its place in this process.

    Args:
        fault: see :func:`strike`, and what is replaced here.
        shards: folder of the training shards.
    """
    from svite_scale.checkpoint import checkpoint
    from svite_scale.data.dataset import Row, ShardDataset
    from svite_scale.runtime import ranks
    from svite_scale.runtime.activity import Activity, Phase
    from svite_scale.train import guard, trainer

    enter, load = Activity.enter, ShardDataset.load_sample

    def entered(self: Activity, phase: Phase) -> None:
        enter(self, phase)
        if self.step >= AFTER_STEP and phase == PHASES.get(fault, "compute") and not Struck.now:
            Struck.now = True
            strike(fault, shards)

    def load_first_epoch(self: ShardDataset, row: Row) -> Any:
        return mistake() if row[0] else load(self, row)

    replaced: dict[str, tuple[Any, str, Any]] = {
        "memory": (guard, "spread_nonfinite", once_struck(OutOfMemory.apply, guard.spread_nonfinite)),
        "transform": (ShardDataset, "load_sample", load_first_epoch),
        "writer": (checkpoint, "write_checkpoint", mistake),
        "closing": (trainer.Checkpoint, "close", hang),
        "group": (ranks, "stop", hang),
    }
    for owner, name, faulty in [(Activity, "enter", entered), *filter(None, [replaced.get(fault)])]:
        setattr(owner, name, faulty)


if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        inject(os.environ["FAULT"], Path(os.environ["FAULT_SHARDS"]))
    sys.argv[0] = str(Path(__file__).parents[1] / "launch" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
