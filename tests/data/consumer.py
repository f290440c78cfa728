"""A training process without a model: logs which samples each step consumed, until it is killed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

from svite_scale.data.options import AugmentConfig
from tests.data.numbered import grey_config, numbers, train_data

BATCH, ACCUMULATION, SEED = 24, 2, 3
PATIENCE_S = 120


class Run(NamedTuple):
    """Settings that are the same on all ranks of a run."""

    pattern: str
    world: int
    workers: int
    first_step: int
    last_step: int
    pause_at: int
    """Step before which a rank waits to be killed."""
    last_batch: str
    repeats: int


def consume(run: Run, rank: int, log: Path) -> None:
    """Runs one rank. Its process leads a process group that includes its loader processes."""
    os.setsid()
    torch.set_num_threads(1)
    augment = AugmentConfig(repeats=run.repeats)
    config = grey_config(train=run.pattern, workers=run.workers, last_batch=run.last_batch, shuffle_shards=2, augment=augment)
    stream = train_data(config, BATCH, ACCUMULATION, rank, run.world, SEED).batches(run.first_step, run.last_step)
    with open(log, "ab", buffering=0) as file:
        for step in range(run.first_step, run.last_step):
            if step == run.pause_at:
                time.sleep(PATIENCE_S)
            samples = [number for _ in range(ACCUMULATION) for number in numbers(next(stream))]
            # One write, so a step is in the log or not.
            os.write(file.fileno(), f"{step} {' '.join(map(str, samples))}\n".encode())
