"""Steps that aren't finite change nothing, on every engine; too many of them, or of spikes, stop the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from svite_scale.config.schema import Config
from svite_scale.data.loader import Batch, TrainData
from svite_scale.errors import DivergedError
from svite_scale.runtime.signals import Preempted
from svite_scale.runtime.world import World
from svite_scale.train.guard import Guard, spread_nonfinite
from svite_scale.train.metrics import MetricsAverage
from svite_scale.train.options import GuardConfig
from svite_scale.train.trainer import Trainer
from tests.command_line import run_here
from tests.jobs import Job
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, State, metrics_of, state_of
from tests.tiny import tiny_config, write_config_file


@dataclass
class Seen:
    """Of one rank: the states before the first step and after each one, and the labels of the batches trained on."""

    states: list[State] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)


def trained(config: Config, spoil: Callable[[int, Tensor], Tensor]) -> Seen:
    """Runs on every rank; ``spoil`` makes other logits of a step's, on the last rank alone."""
    world, seen = World.from_environment(), Seen()

    def look() -> bool:
        seen.states.append(state_of(trainer))
        return False

    trainer = Trainer(config, world, torch.device("cpu"), resume=False, asked_to_stop=look)
    forward, add = trainer.backend.forward, MetricsAverage.add

    def spoiled(images: Tensor) -> Tensor:
        logits = forward(images)
        return spoil(trainer.step, logits) if world.rank == world.size - 1 and logits.requires_grad else logits

    def noted(self: MetricsAverage, loss: Tensor, selector_loss: Tensor, logits: Tensor, batch: Batch) -> None:
        seen.labels.append(batch.labels.tolist())
        add(self, loss, selector_loss, logits, batch)

    with patch.object(trainer.backend, "forward", spoiled), patch.object(MetricsAverage, "add", noted):
        trainer.run()
    return seen


def nan_in_step_4(step: int, logits: Tensor) -> Tensor:
    return logits * torch.nan if step == 3 else logits


def run_with_nan(config: Config) -> list[State]:
    return trained(config, nan_in_step_4).states


CLIP, NO_CLIP = "train.clip_grad_norm=1.0", "train.clip_grad_norm=null"
RUNS = {
    **{name: (name, CLIP) for name in ENGINES},
    **{f"{name} without clipping": (name, NO_CLIP) for name in ("ddp", "fsdp2", "zero2", "zero3")},
    **{f"{name} in bf16": (name, CLIP, "train.precision=bf16") for name in ("fsdp2", "zero2", "zero3")},
    "two micro-batches": ("zero3", CLIP, "train.accumulation_steps=2"),
}


@pytest.mark.parametrize("name", RUNS)
def test_step_changes_nothing_on_any_rank_when_it_isnt_finite_on_one(tmp_path: Path, digits: Path, name: str) -> None:
    engine, *overrides = RUNS[name]
    config = tiny_config(digits, tmp_path / "run", *ENGINES[engine], *overrides, "train.max_steps=6")
    for states in run_on_ranks(1 if engine == "single" else 2, run_with_nan, config):
        before, after, later = states[3], states[4], states[5]
        assert (before.step, after.step) == (3, 4)
        assert after.scalars == before.scalars, "the optimizer hasn't counted it"
        assert after.tensors.keys() == before.tensors.keys()
        for tensor in before.tensors:
            np.testing.assert_array_equal(after.tensors[tensor], before.tensors[tensor], err_msg=tensor)
        for statistic, value in before.statistics.items():
            np.testing.assert_array_equal(after.statistics[statistic], value, err_msg=statistic)
        assert sum(not np.array_equal(later.tensors[tensor], after.tensors[tensor]) for tensor in after.tensors) > 20
        assert all(np.isfinite(tensor).all() for tensor in states[-1].tensors.values())
    lines = metrics_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert ["loss" in line for line in lines] == [True, True, True, False, True, True]
    assert ["grad_norm" in line for line in lines] == ["loss" in line for line in lines]
    # An update was due then, and comes with the next step, on that one's gradients.
    assert ["dropped" in line for line in lines] == [False, False, False, False, True, False]
    assert [line["postponed_updates"] for line in lines] == [0, 0, 0, 1, 1, 1]


def test_topology_update_uses_the_other_steps_of_its_window_when_one_is_skipped(tmp_path: Path, digits: Path) -> None:
    config = tiny_config(digits, tmp_path / "run", "sparsity.update_every=5", "sparsity.grow_window=3", "train.max_steps=5")
    run_on_ranks(1, run_with_nan, config)
    last = metrics_of(tmp_path / "run")[-1]
    assert (last["skipped_steps"], last["postponed_updates"], "dropped" in last) == (1, 0, True)


def test_step_is_applied_when_the_guard_does_not_look(tmp_path: Path, digits: Path) -> None:
    config = tiny_config(digits, tmp_path / "run", "guard.max_nonfinite_steps=null", "train.max_steps=5")
    (states,) = run_on_ranks(1, run_with_nan, config)
    assert np.isnan(states[4].tensors["head.bias"]).all()


@pytest.mark.parametrize("loss", [torch.inf, -torch.inf, torch.nan])
def test_spread_nonfinite_makes_the_gradient_nan_when_the_loss_isnt_finite(loss: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    spread_nonfinite(weight.sum() + loss).backward()
    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_spread_nonfinite_keeps_a_finite_loss_and_its_gradient() -> None:
    weight = torch.tensor([0.1, 0.7], requires_grad=True)
    loss = spread_nonfinite((weight * weight).sum())
    loss.backward()
    assert loss.detach() == (weight.detach() ** 2).sum()
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * weight.detach())


def test_diverged_run_prints_its_error_once_on_two_ranks(digits: Path, tmp_path: Path) -> None:
    path = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    overrides = ("parallel.backend=ddp", "optimizer.lr=1e38", "guard.max_nonfinite_steps=3", "tracking.mlflow=true")
    main, other = Job(2, path, *overrides).wait()
    assert (main.status, other.status) == (1, 1)
    assert "error: loss or gradient weren't finite in 3 steps in a row" in main.err
    assert "error" not in other.err
    run_id = (tmp_path / "run" / "mlflow_run_id").read_text().strip()
    assert MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run_id).info.status == "FAILED"


def test_diverged_run_stops_and_names_its_last_checkpoint(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    # The first step is of the warm-up's own rate; the second makes the weights too large for floats.
    start = ["--config", str(path), "optimizer.lr=1e38", "guard.max_nonfinite_steps=3"]
    assert run_here(capsys, *start, "train.max_steps=1").status == 0
    answer = run_here(capsys, *start, "--resume")
    assert answer.status == 1
    assert answer.err.splitlines()[-1] == (
        "error: loss or gradient weren't finite in 3 steps in a row, up to step 5 (guard.max_nonfinite_steps); the last good "
        f"checkpoint is {tmp_path}/run/checkpoints/step-00000001; resume from it with a train.clip_grad_norm, or start again "
        "with a lower optimizer.lr"
    )


SPIKE_STEP, SAVED = 20, 16
ROLLBACK = ("train.epochs=8", "checkpoint.every_epochs=4", "guard.spike_factor=3.0")
"""32 steps, saved after steps 16 and 32."""


def run_with_spikes(config: Config, times: int) -> list[list[int]]:
    """Labels trained on, of a run whose loss spikes in step 20, as often as it gets there."""
    seen: list[int] = []

    def spike(step: int, logits: Tensor) -> Tensor:
        if step != SPIKE_STEP - 1 or len(seen) == times:
            return logits
        seen.append(step)
        return 100 * logits

    return trained(config, spike).labels


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("zero3", 2)])
def test_spike_rolls_the_run_back_and_leaves_out_the_data(tmp_path: Path, digits: Path, engine: str, world_size: int) -> None:
    config = tiny_config(digits, tmp_path / "run", *ENGINES[engine], *ROLLBACK)
    for rank, labels in enumerate(run_on_ranks(world_size, run_with_spikes, config, 1)):
        world = World(rank=rank, size=world_size)
        data = TrainData(config.data, image_shape=(1, 8, 8), global_batch_size=16, seed=config.seed, world=world)
        every_batch = [batch.labels.tolist() for batch in data.batches(0, 32 + SPIKE_STEP - SAVED)]
        assert labels == every_batch, "16 steps, 4 that were undone, and 16 more, on data that was never seen"
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 33)), "each step once"
    assert [line["rollbacks"] for line in lines] == [0] * SAVED + [1] * 16
    assert max(line["loss"] for line in lines) < 4
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000032" / "run.json").read_text())["counts"]["guard"]
    assert (state["rollbacks"], state["data_offset"]) == (1, SPIKE_STEP - SAVED)

    longer = tiny_config(digits, tmp_path / "run", *ENGINES[engine], *ROLLBACK, "train.max_steps=32")
    assert run_on_ranks(world_size, offset_after_a_resume, longer) == [SPIKE_STEP - SAVED] * world_size


def offset_after_a_resume(config: Config) -> int:
    return Trainer(config, World.from_environment(), torch.device("cpu"), resume=True).guard.data_offset


def test_rollback_is_remembered_when_the_run_stops_in_the_same_step(tmp_path: Path, digits: Path) -> None:
    """Where the run is asked to stop in the very step that spikes."""
    config = tiny_config(digits, tmp_path / "run", *ROLLBACK)
    run_on_ranks(1, spikes_and_stops, config)
    assert (tmp_path / "run" / "checkpoints" / f"step-{SAVED:08d}-2").is_dir()
    assert run_on_ranks(1, offset_after_a_resume, config) == [SPIKE_STEP - SAVED]


def spikes_and_stops(config: Config) -> None:
    trainer = Trainer(
        config, World.from_environment(), torch.device("cpu"), resume=False, asked_to_stop=lambda: trainer.step == SPIKE_STEP
    )
    forward = trainer.backend.forward
    with (
        patch.object(
            trainer.backend, "forward", lambda images: forward(images) * (100 if trainer.step == SPIKE_STEP - 1 else 1)
        ),
        pytest.raises(Preempted),
    ):
        trainer.run()


def test_spike_stops_the_run_after_max_rollbacks(tmp_path: Path, digits: Path) -> None:
    config = tiny_config(digits, tmp_path / "run", *ROLLBACK, "guard.max_rollbacks=2")
    (message,) = run_on_ranks(1, diverging, config)
    assert re.fullmatch(
        r"the loss spiked from [12]\.\d+ to \d+(\.\d+)? at step 20 \(guard\.spike_factor\), after 2 rollbacks "
        rf"\(guard\.max_rollbacks\); the last good checkpoint is {tmp_path}/run/checkpoints/step-00000016-3; start again with "
        r"a lower optimizer\.lr",
        message,
    )


def diverging(config: Config) -> str:
    with pytest.raises(DivergedError) as caught:
        run_with_spikes(config, 3)
    return str(caught.value)


def test_spike_is_measured_against_the_sixteen_losses_before_it() -> None:
    guard = Guard(GuardConfig(spike_factor=2.0))
    path = Path("checkpoint")
    # Mean 1.5 once there are 16.
    losses = [9.0, *[1.0, 2.0] * 7]
    assert not any(guard.is_spike(step, loss, lambda: path) for step, loss in enumerate(losses))
    assert not guard.is_spike(15, 99.0, lambda: path), "too few to tell"
    assert not guard.is_spike(16, 1.0, lambda: path)
    usual = (sum([1.0, 2.0] * 7) + 99 + 1) / 16
    assert not guard.is_spike(17, 2 * usual, lambda: path)
    usual = (sum([1.0, 2.0] * 7) - 1 + 99 + 1 + 2 * usual) / 16
    assert guard.is_spike(18, 2 * usual + 0.01, lambda: path)
    assert guard.is_spike(18, 2 * usual + 0.01, lambda: path), "a spike isn't usual"
    assert not guard.is_spike(19, None, lambda: path), "a skipped step has no loss"
    with pytest.raises(DivergedError, match=r"after 0 rollbacks .* there is no checkpoint; start again"):
        guard.is_spike(18, 1e9, lambda: None)


def test_nothing_is_a_spike_without_a_factor() -> None:
    guard = Guard(GuardConfig())
    assert not any(guard.is_spike(step, 10.0**step, lambda: None) for step in range(30))


def test_guard_keeps_its_counts_when_a_run_resumes() -> None:
    guard = Guard(GuardConfig(max_nonfinite_steps=3, spike_factor=2.0))
    for step, applied in enumerate([False, True, False, False], start=1):
        guard.end_step(step, applied, lambda: None)
    guard.roll_back(20, 16)
    for _ in range(16):
        guard.is_spike(4, 1.0, lambda: Path("checkpoint"))
    resumed = Guard(guard.config)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.metrics() == {"skipped_steps": 3, "rollbacks": 1}
    assert resumed.data_offset == 4
    assert resumed.is_spike(5, 2.1, lambda: Path("checkpoint"))
    with pytest.raises(DivergedError, match="in 3 steps in a row, up to step 5"):
        resumed.end_step(5, False, lambda: None)
