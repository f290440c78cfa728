"""``launch/train.py`` in which something goes wrong on the last rank, for any launcher; ``FAULT`` in the environment says what.

Most faults strike once, on entering a phase after the third step.
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
PHASES = {"evaluation": "evaluation", "topology": "topology update", "saving": "checkpoint"}
"""Where a fault strikes; if nothing is said, ``forward``."""

SMALL_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=512k none /dev/shm && exec "$@"', "sh")
"""Runs a command with a /dev/shm of its own, for the fault ``shm``; as root."""


class Struck:
    """Whether the fault has struck."""

    now = False


def strike(fault: str, shards: Path) -> None:
    """What happens on the main thread."""
    if fault == "unreadable":
        for path in shards.glob("train-*.tar"):
            path.write_bytes(b"")
    elif fault == "killed":
        os.kill(next(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)
    elif fault == "shm":
        fill_shm()
    elif fault in ("SIGSTOP", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "exit":
        sys.exit(0)
    elif fault in ("evaluation", "topology", "saving", "closing"):
        mistake()


def fill_shm() -> None:
    """To the last byte, if it is the small one."""
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
    """One function until the fault strikes, another from then on."""
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
    from svite_scale.runtime.activity import Activity
    from svite_scale.train import trainer

    enter, load, build_backend = Activity.enter, ShardDataset.load_sample, trainer.build_backend

    def entered(self: Activity, phase: str) -> None:
        enter(self, phase)
        if self.step >= AFTER_STEP and phase == PHASES.get(fault, "forward") and not Struck.now:
            Struck.now = True
            strike(fault, shards)

    def load_first_epoch(self: ShardDataset, row: Row) -> Any:
        return mistake() if row[0] else load(self, row)

    def build_faulty(*args: Any) -> Any:
        backend = build_backend(*args)
        backend.step = once_struck(mistake, backend.step)  # type: ignore[method-assign]
        return backend

    replaced: dict[str, tuple[Any, str, Any]] = {
        "memory": (trainer, "spread_nonfinite", once_struck(OutOfMemory.apply, trainer.spread_nonfinite)),
        "transform": (ShardDataset, "load", load_first_epoch),
        "optimizer": (trainer, "build_backend", build_faulty),
        "constructor": (trainer, "Guard", mistake),
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
