"""A save that is written in the background is of the step it was asked for at, whatever training does meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.checkpoint import measure
from benchmarks.kills import SAVING, check_state, small_run, write_state
from tests.ranks import run_on_ranks
from tests.runs import metrics_of, run
from tests.tiny import tiny_config


def train_while_saving(directory: Path, kind: str) -> tuple[int, dict[str, float], list[str]]:
    """Saves step 1 and, without waiting, step 2; changes all weights meanwhile, with collectives of its own."""
    backend, topology, checkpoint = small_run(directory, SAVING, kind)
    metrics: dict[str, float] = {}
    for step in (1, 2):
        topology.step()
        write_state(backend, step)
        checkpoint.save(step)
        # This step is saved already.
        checkpoint.save(step)
        write_state(backend, 100 + step)
        metrics |= checkpoint.metrics()
    exchanges = 0
    while "checkpoint_seconds" not in metrics or exchanges < 20:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()
        metrics |= checkpoint.metrics()
        exchanges += 1
    step = checkpoint.load_newest()
    check_state(backend, step)
    assert checkpoint.last_saved == directory / "step-00000002"
    checkpoint.close()
    return step, metrics, sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_background_save_has_the_state_of_its_step_when_training_continues(tmp_path: Path, kind: str) -> None:
    for step, metrics, names in run_on_ranks(2, train_while_saving, tmp_path / "checkpoints", kind):
        assert step == 2
        assert names == ["owner", "step-00000001", "step-00000002"]
        assert metrics["failed_saves"] == 0
        assert metrics["checkpoint_stall_ms"] > 0
        assert metrics["checkpoint_seconds"] > 0


def test_a_run_saves_by_steps_and_epochs_and_logs_what_it_cost(tmp_path: Path, digits: Path) -> None:
    saving = ("checkpoint.every_steps=3", "checkpoint.every_epochs=2", "checkpoint.keep_last=2", "train.max_steps=10")
    run_on_ranks(2, run, tiny_config(digits, tmp_path / "run", "parallel.backend=fsdp2", *saving))
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines if "checkpoint_stall_ms" in line] == [3, 6, 8, 9, 10]
    assert "checkpoint_seconds" in lines[-1], "the last save was waited for"
    assert all(line["failed_saves"] == 0 for line in lines)
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"owner", "step-00000009", "step-00000010"}


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_the_size_of_a_checkpoint_falls_with_density(tmp_path: Path, backend: str) -> None:
    """Beside active weights, moments and averages, each weight has a bit of mask and one of history, and each active one a bit
    that marks recently grown weights: 0.018 of the dense twin at density 0.3. The rest is 1.8 kB of framing per chunk, which
    the small tensors of this model feel most; benchmarks/checkpoint.py prints other models.
    """
    packed, dense = (
        run_on_ranks(2, measure, backend, "deit_tiny_patch16_224", density, True, 1, tmp_path)[0] for density in (0.3, 1.0)
    )
    active_share = packed.parameters / dense.parameters
    assert active_share < packed.size / dense.size <= active_share + 0.04
    assert dense.size == pytest.approx(16 * dense.parameters, rel=0.03)
