"""No sample is lost or repeated when the processes of a run are killed anywhere, and any number of them resumes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from svite_scale.data.order import epoch_order
from tests.data.consumer import BATCH, PATIENCE_S, SEED, Run, consume
from tests.ranks import forked

COUNT, EPOCHS = 53, 6
COUNTS = [10, 10, 10, 10, 10, 3]


class Life:
    """The processes of a run between its start and its death."""

    def __init__(self, log: Path, run: Run) -> None:
        self.logs = [log.with_suffix(f".{rank}") for rank in range(run.world)]
        self.ranks = [forked.Process(target=consume, args=(run, rank, path)) for rank, path in enumerate(self.logs)]
        for rank in self.ranks:
            rank.start()

    def steps_of(self, rank: int) -> dict[int, list[int]]:
        """Returns what a rank logged, by step."""
        path = self.logs[rank]
        lines = [[int(word) for word in line.split()] for line in path.read_text().splitlines()] if path.exists() else []
        return {step: samples for step, *samples in lines}

    def kill_after(self, step: int) -> None:
        """Kills all processes, loader processes too, once the first rank has logged ``step``, or all have ended."""
        deadline = time.monotonic() + PATIENCE_S
        while step not in self.steps_of(0) and any(rank.is_alive() for rank in self.ranks):
            assert time.monotonic() < deadline, "the processes hang"
            time.sleep(0.002)
        for rank in self.ranks:
            assert rank.pid is not None
            with suppress(ProcessLookupError):  # it has ended by itself
                # Before it leads a group, it has no loader processes either.
                leads = os.getpgid(rank.pid) == rank.pid
                (os.killpg if leads else os.kill)(rank.pid, signal.SIGKILL)
            rank.join(PATIENCE_S)
            assert rank.exitcode in (0, -signal.SIGKILL)

    def consumed(self, first: int) -> list[list[int]]:
        """The samples of each step from ``first`` on that all ranks completed, as a checkpoint would count them."""
        logged = [self.steps_of(rank) for rank in range(len(self.ranks))]
        found = []
        while all(first + len(found) in steps for steps in logged):
            found.append([sample for steps in logged for sample in steps[first + len(found)]])
        return found


@pytest.mark.parametrize(("last_batch", "repeats", "seed"), [("carry", 1, 0), ("carry", 3, 1), ("drop", 1, 2)])
def test_epochs_are_consumed_exactly_once(tmp_path: Path, many: str, last_batch: str, repeats: int, seed: int) -> None:
    chance = random.Random(seed)
    kept = COUNT if last_batch == "carry" else COUNT // BATCH * BATCH
    total = EPOCHS * kept // BATCH
    consumed: list[list[int]] = []
    lives: list[tuple[int, int, int]] = []
    while len(consumed) < total:
        world, workers = chance.choice([1, 2, 3, 4]), chance.choice([0, 1, 2])
        # The last life ends by itself; the others once the first rank has logged a step, wherever the other ranks are.
        last = len(lives) == 3
        kill_at = total if last else chance.randrange(len(consumed), max(total - 3, len(consumed) + 1))
        run = Run(many, world, workers, len(consumed), total, kill_at + 3, last_batch, repeats)
        life = Life(tmp_path / f"life-{len(lives)}", run)
        life.kill_after(kill_at)
        lives.append((world, workers, len(consumed)))
        consumed += life.consumed(len(consumed))
        assert not last or len(consumed) == total, f"{lives}: the last life ended early"
    assert len(lives) > 1, "nothing was killed; choose another seed"
    orders = [epoch_order(COUNTS, SEED, epoch, 2, repeats)[:kept, 0].tolist() for epoch in range(EPOCHS)]
    rows = [sample for order in orders for sample in order][: total * BATCH]
    for step, samples in enumerate(consumed):
        assert Counter(samples) == Counter(rows[step * BATCH : (step + 1) * BATCH]), (lives, step)
    if repeats == 1:
        # A whole epoch has every sample once; an epoch without its tail has none twice.
        whole = Counter(sample for step in consumed for sample in step)
        assert sum(whole.values()) == total * BATCH
        assert max(whole.values()) <= EPOCHS
        assert last_batch == "drop" or sorted(rows[:COUNT]) == list(range(COUNT))
