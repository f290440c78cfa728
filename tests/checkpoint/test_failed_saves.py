"""A run whose disk fails: it continues while it can, but never reports a save that failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from svite_scale.config.schema import Config
from svite_scale.errors import CheckpointError
from svite_scale.runtime.world import World
from svite_scale.train.trainer import Trainer
from tests.ranks import run_on_ranks
from tests.runs import Lines, metrics_of
from tests.small_disk import fill
from tests.tiny import tiny_config

TWO = ("parallel.backend=ddp", "checkpoint.every_steps=4", "checkpoint.background=false")


def train(config: Config, after_step: Callable[[int], bool]) -> str:
    """Trains on every rank. The main rank calls ``after_step`` after each step; it returns whether to stop.

    Returns:
        The message of the error that a checkpoint ended the run with; empty where none did.
    """
    world = World.from_environment()

    def asked() -> bool:
        answer = [after_step(trainer.step) if world.is_main else False]
        dist.broadcast_object_list(answer)
        return answer[0]

    trainer = Trainer(config, world, torch.device("cpu"), resume=False, asked_to_stop=asked)
    try:
        trainer.run()
    except CheckpointError as error:
        return str(error)
    return ""


def breaks(config: Config, stops: bool) -> str:
    """``checkpoints/`` vanishes after step 6; the run is asked to stop there, or continues to the end."""
    checkpoints = Path(config.run_dir) / "checkpoints"

    def after_step(step: int) -> bool:
        if step == 6:
            checkpoints.rename(checkpoints.with_name("elsewhere"))
        return stops and step == 6

    return train(config, after_step)


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_fails_when_its_last_save_fails(tmp_path: Path, digits: Path, stops: bool) -> None:
    """Whatever ``checkpoint.on_error`` is: no later save will make up for it."""
    config = tiny_config(digits, tmp_path / "run", *TWO, "train.max_steps=7")
    first, second = run_on_ranks(2, breaks, config, stops)
    folder, step = tmp_path / "run" / "checkpoints", 6 if stops else 7
    assert first.startswith(f"can't save {folder}/step-{step:08d}: [Errno 2] No such file or directory")
    assert first.endswith(f"; the last checkpoint of this run is {folder}/step-00000004")
    assert second == first
    assert not (tmp_path / "run" / "summary.json").exists()


def fills_the_disk(config: Config) -> tuple[str, list[str]]:
    """Also returns what was said of it."""
    filler, said = Path(config.run_dir).parent / "filler", Lines()
    logging.getLogger("svite_scale").addHandler(said)

    def after_step(step: int) -> bool:
        if step == 2:
            fill(filler)
        if step == 15:
            filler.unlink()
        return False

    return train(config, after_step), said.lines


def test_a_run_continues_and_loses_no_metric_when_the_disk_is_full(small_disk: Path, digits: Path) -> None:
    run_dir = small_disk / "run"
    config = tiny_config(digits, run_dir, *TWO, "train.eval_every_epochs=4")
    main, other = run_on_ranks(2, fills_the_disk, config)
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 17)), "each once"
    assert [line["failed_saves"] for line in lines] == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 5
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000016"]
    assert (main[0], other) == ("", ("", []))
    unwritten = [line for line in main[1] if "metrics.jsonl" in line]
    assert len(unwritten) == 1
    assert unwritten[0].startswith(f"{run_dir}/metrics.jsonl doesn't take lines ([Errno 28] No space left on device)")
    unsaved = [line for line in main[1] if "can't save" in line]
    assert len(unsaved) == 3
    assert all(line.endswith("the run continues (checkpoint.on_error is continue)") for line in unsaved)
