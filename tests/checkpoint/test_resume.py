"""A resumed run equals one that never stopped, on any engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from svite_scale.checkpoint import state
from svite_scale.checkpoint.checkpoint import Checkpoint
from svite_scale.checkpoint.load import read_run_state
from svite_scale.checkpoint.save import Snapshot
from svite_scale.config.schema import Config
from svite_scale.errors import SviteScaleError
from svite_scale.runtime.world import World
from svite_scale.sparsity.topology.statistics import TopologyUpdate
from svite_scale.train.trainer import Trainer
from tests.ranks import run_on_ranks
from tests.runs import (
    ENGINES,
    State,
    assert_same_state,
    loaded,
    losses_of,
    metrics_of,
    resumed_run,
    run,
    state_of,
    whole_statistics,
)
from tests.tiny import tiny_config

STOP, END = 6, 10
"""The topology moves after steps 4 and 8."""

BATCH = ("train.global_batch_size=12", "train.accumulation_steps=2")
RANDOM = ("model.drop_path=0.3", "data.augment.recipe=affine")
"""What a step draws must be drawn again after a resume."""


def config_of(digits: Path, run_dir: Path, engine: str, last_step: int, *overrides: str) -> Config:
    return tiny_config(digits, run_dir, *ENGINES[engine], *BATCH, f"train.max_steps={last_step}", *overrides)


FP32 = [("single", 1, "fp32"), ("ddp", 2, "fp32")]
BF16 = [(engine, 2, "bf16") for engine in ("fsdp2", "zero1", "zero3")]
"""FSDP2, ZeRO-2 and ZeRO-3 in fp32 are resumed within a growth window, below. One optimizer serves ZeRO-1 and 2."""


@pytest.mark.parametrize(("engine", "world_size", "precision"), FP32 + BF16)
def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, digits: Path, engine: str, world_size: int, precision: str
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    overrides = (*RANDOM, f"train.precision={precision}")
    ended = run_on_ranks(world_size, run, config_of(digits, straight, engine, END, *overrides))

    run_on_ranks(world_size, run, config_of(digits, stopped, engine, STOP, *overrides))
    assert [line["step"] for line in metrics_of(stopped)] == list(range(1, STOP + 1))
    with (stopped / "metrics.jsonl").open("a") as lines:
        # What a kill leaves of the steps after the last checkpoint.
        lines.write('{"step": 7, "loss": 99.0}\n{"step": 8, "lo')
    resumed = run_on_ranks(world_size, resumed_run, config_of(digits, stopped, engine, END, *overrides))

    assert [line["step"] for line in metrics_of(stopped)] == list(range(1, END + 1))
    assert losses_of(stopped) == losses_of(straight), "bit by bit"
    assert resumed[0].step == END
    masks = [name for name in ended[0].tensors if name.endswith(".mask")]
    assert len(masks) >= 8
    for name in masks:
        np.testing.assert_array_equal(resumed[0].tensors[name], ended[0].tensors[name], err_msg=name)
    assert_same_state(ended, resumed)
    moved = {line["step"]: line["dropped"] - line["regrown"] for line in metrics_of(stopped) if "dropped" in line}
    assert list(moved) == [4, 8]
    assert min(moved.values()) > 10


WINDOW = ("sparsity.grow_window=3", "sparsity.grown_warmup_steps=4", "sparsity.method=mixed")
"""The window of the update after step 8 begins with step 6, and the weights grown after step 4 warm up until then."""


def postponed(config: Config, resume: bool) -> State:
    """Trains on a rank, with a gradient in the fourth step that isn't finite."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=resume)
    topology, (layer, *_) = trainer.topology, trainer.topology.layers.values()
    step = topology.step

    def poisoned_step(**arguments: bool) -> TopologyUpdate | None:
        if topology.steps == 3 and layer.gradient_hook is not None:
            layer.gradient_hook(torch.full(layer.shape, torch.nan))
        return step(**arguments)

    topology.step = poisoned_step  # type: ignore[method-assign]
    trainer.run()
    return state_of(trainer)


def test_a_postponed_update_is_counted_and_happens_after_a_resume(tmp_path: Path, digits: Path) -> None:
    """By a window of two steps after the fourth, and so the fifth, after which the run stops, is already heard for it."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ended = run_on_ranks(1, postponed, config_of(digits, straight, "single", END, "sparsity.grow_window=2"), False)
    run_on_ranks(1, postponed, config_of(digits, stopped, "single", 5, "sparsity.grow_window=2"), False)
    resumed = run_on_ranks(1, postponed, config_of(digits, stopped, "single", END, "sparsity.grow_window=2"), True)
    assert_same_state(ended, resumed)
    for run_dir in (straight, stopped):
        lines = metrics_of(run_dir)
        assert [line["step"] for line in lines if "dropped" in line] == [6, 8]
        assert [line["postponed_updates"] for line in lines] == [0] * 3 + [1] * (END - 3)


TOKENS = ("model.depth=3", "sparsity.tokens.keep=0.6", "sparsity.tokens.keep_warmup=0.3")
PAPER = ("sparsity.tokens.signal=paper",)
SINGLE, TALL = "sparsity.block=[1,1]", "sparsity.block=[16,1]"


@pytest.mark.parametrize(
    ("engine", "world_size", "block"), [("single", 1, TALL), ("fsdp2", 2, TALL), ("zero2", 2, SINGLE), ("zero3", 3, TALL)]
)
def test_a_run_resumes_within_a_growth_window_and_a_warm_up_and_draws_the_same_tokens(
    tmp_path: Path, digits: Path, engine: str, world_size: int, block: str
) -> None:
    """And the tokens that pass, and the temperature of the paper's selector, are those of the step."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = (*WINDOW, *TOKENS, block, *(PAPER if engine == "fsdp2" else ()))
    ended = run_on_ranks(world_size, run, config_of(digits, straight, engine, END, *options))
    saved = run_on_ranks(world_size, run, config_of(digits, stopped, engine, STOP, *options))
    assert any(name.startswith("growth/") and np.abs(value).max() > 0 for name, value in saved[0].statistics.items())
    resumed = run_on_ranks(world_size, resumed_run, config_of(digits, stopped, engine, END, *options))
    assert_same_state(ended, resumed)
    assert losses_of(stopped) == losses_of(straight)
    moments = [np.abs(moment).max() for name, moment in resumed[0].tensors.items() if "selector0" in name]
    assert min(moments) > 0
    for run_dir in (straight, stopped):
        lines = metrics_of(run_dir)
        # 64 samples in batches of 12 are 5 steps per epoch, 20 in all. So the tokens fall over 0.3 * 20 = 6 steps, of 4 patches
        # and the class token to 3, by half of 2 patches (1 + cos) at sevenths of the way.
        ways = [math.floor(7 * min(step / 6, 1.0)) / 7 for step in range(END)]
        assert [line["tokens"] for line in lines] == [3 + round(1 + math.cos(math.pi * way)) for way in ways]
        if engine == "fsdp2":
            assert [line["temperature"] for line in lines] == pytest.approx([10 - 9.9 * step / 20 for step in range(END)])
        else:
            assert all(line["selector_loss"] > 0 for line in lines)


def noise_seeds(config: Config) -> list[int]:
    """Runs on every rank: the seed of the generator that a selector draws from, at each forward of the training."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=False)
    seeds: list[int] = []
    trainer.selectors[0].register_forward_pre_hook(
        lambda module, _: seeds.append(torch.initial_seed()) if module.training else None
    )
    trainer.run()
    return seeds


def test_every_rank_step_and_micro_batch_has_its_own_noise(tmp_path: Path, digits: Path) -> None:
    ranks = run_on_ranks(2, noise_seeds, config_of(digits, tmp_path / "run", "ddp", 3, *TOKENS, *PAPER))
    assert [len(seeds) for seeds in ranks] == [3 * 2, 3 * 2], "3 steps of 2 micro-batches"
    assert len({seed for seeds in ranks for seed in seeds}) == 12


def test_a_growth_window_resumes_on_another_engine_and_number_of_ranks(tmp_path: Path, digits: Path) -> None:
    """Of blocks, and of the single weights of the head, which they don't divide."""
    source, straight, options = tmp_path / "source", tmp_path / "straight", (*WINDOW, TALL)
    saved = run_on_ranks(2, run, config_of(digits, source, "fsdp2", STOP, *options))
    assert_same_state(saved, run_on_ranks(2, loaded, config_of(digits, source, "zero3", END, *options)))
    run_on_ranks(2, run, config_of(digits, straight, "fsdp2", END, *options))
    run_on_ranks(3, resumed_run, config_of(digits, source, "zero1", END, *options))
    assert losses_of(source) == pytest.approx(losses_of(straight), abs=1e-5)


def refusal_of_resume(config: Config) -> str:
    try:
        Trainer(config, World.from_environment(), torch.device("cpu"), resume=True)
    except SviteScaleError as error:
        return str(error)
    return "it resumed"


def test_a_resume_with_another_block_is_refused_by_name(tmp_path: Path, digits: Path) -> None:
    run_on_ranks(1, run, config_of(digits, tmp_path / "run", "single", 1, TALL))
    (found,) = run_on_ranks(1, refusal_of_resume, config_of(digits, tmp_path / "run", "single", END, SINGLE))
    message = "step-00000001 was saved with sparsity.block = [16, 1], not [1, 1]; restore it, or start a new run"
    assert found.endswith(message), found


def run_as_an_older_version(config: Config) -> State:
    """Saves some statistics and counters by the names that they had before."""
    take = Checkpoint._snapshot

    def older(checkpoint: Checkpoint, step: int) -> Snapshot:
        snapshot = take(checkpoint, step)
        counters = dict(snapshot.run_state["topology"])
        counters |= {"heard_steps": counters.pop("recorded_steps"), "heard_ranks": counters.pop("recorded_ranks")}
        assert counters.pop("frozen") == []
        tensors = {name.replace("/recently_grown/", "/newcomers/"): tensor for name, tensor in snapshot.tensors.items()}
        run_state = {name: part for name, part in snapshot.run_state.items() if name != "step"}
        return Snapshot(step, tensors, {**run_state, "topology": counters})

    with patch.object(Checkpoint, "_snapshot", older):
        return run(config)


def test_a_checkpoint_of_an_older_version_loads_by_its_names(tmp_path: Path, digits: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ended = run_on_ranks(2, run, config_of(digits, straight, "fsdp2", END, *WINDOW))
    run_on_ranks(2, run_as_an_older_version, config_of(digits, stopped, "fsdp2", STOP, *WINDOW))
    (run_state,) = stopped.glob("checkpoints/step-00000006/run.json")
    assert json.loads(run_state.read_text())["topology"]["heard_steps"] == 1
    resumed = run_on_ranks(2, resumed_run, config_of(digits, stopped, "fsdp2", END, *WINDOW))
    assert_same_state(ended, resumed)


def test_the_frozen_layers_of_an_older_checkpoint_are_read(tmp_path: Path) -> None:
    older = {"steps": 7, "last_update": 4, "postponed": 0, "retry_step": 0, "heard_steps": 2, "heard_ranks": 3}
    sections = {"counts": {}, "optimizer_scalars": {}, "config": {}, "versions": {}}
    (tmp_path / "run.json").write_text(json.dumps({"topology": {**older, "frozen/a.b": 1}, **sections}))
    counters = read_run_state(tmp_path)["topology"]
    assert counters == {
        "steps": 7,
        "last_update": 4,
        "postponed": 0,
        "retry_step": 0,
        "recorded_steps": 2,
        "recorded_ranks": 3,
        "frozen": ["a.b"],
    }


LONG = ("train.epochs=6", "sparsity.update_every=10", "optimizer.lr=3e-3", "train.ema_decay=0.9")
"""30 steps, whose topology moves after steps 10 and 20: a run stopped after step 6 has 20 more with both of them."""

PAIRS = [
    ("single", 1, "zero3", 3),
    ("ddp", 2, "zero1", 3),
    ("fsdp2", 3, "zero2", 2),
    ("zero1", 2, "fsdp2", 3),
    ("zero2", 3, "ddp", 2),
    ("zero3", 3, "single", 1),
]
"""Each engine saves once and loads once, on more ranks or on fewer. A list of engine, ranks, other engine, its ranks."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_on_ranks(1, run, config_of(digits, run_dir, "single", STOP + 20, *LONG))
    return run_dir


@pytest.mark.parametrize(("engine", "world_size", "other", "other_size"), PAIRS)
def test_a_run_resumes_on_another_engine(
    tmp_path: Path, digits: Path, uninterrupted: Path, engine: str, world_size: int, other: str, other_size: int
) -> None:
    """The losses of 20 steps and two updates are those of the run that never stopped; and given equal scores, so are masks."""
    run_dir = tmp_path / "run"
    # Whether a tensor is cut or whole in the files matters as little as who saved it.
    saving, loading = (run_in_pieces, resumed_run) if world_size == 2 else (run, resumed_run_in_pieces)
    saved = run_on_ranks(world_size, saving, config_of(digits, run_dir, engine, STOP, *LONG))
    before, after = (
        run_on_ranks(size, masks_after_an_update, config_of(digits, run_dir, kind, STOP, *LONG))
        for kind, size in ((engine, world_size), (other, other_size))
    )
    assert all(masks == before[0] for masks in (*before, *after))
    assert all(before[0][name] != saved[0].tensors[name].tobytes() for name in before[0]), "it moved something in each layer"

    run_on_ranks(other_size, loading, config_of(digits, run_dir, other, STOP + 20, *LONG))
    assert losses_of(run_dir) == pytest.approx(losses_of(uninterrupted), abs=1e-4)
    assert [line["step"] for line in metrics_of(run_dir) if "dropped" in line] == [10, 20]


def run_in_pieces(config: Config) -> State:
    """Saves all but the smallest tensors in chunks, as it does large ones."""
    with patch.object(state, "SMALL_NUMEL", 10):
        return run(config)


def resumed_run_in_pieces(config: Config) -> State:
    with patch.object(state, "SMALL_NUMEL", 10):
        return resumed_run(config)


def masks_after_an_update(config: Config) -> dict[str, bytes]:
    """Loads the newest checkpoint, and moves the topology by its values and given gradients; the new masks by name."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=True)
    topology = trainer.topology
    while topology.steps + 1 != topology.next_update:
        topology.step()
    for name, layer in topology.layers.items():
        assert layer.gradient_hook is not None
        # Small integers, so that sums are exact on any number of ranks, and tie.
        generator = torch.Generator().manual_seed(len(name) + layer.growth_numel)
        layer.gradient_hook(torch.randint(-9, 10, (layer.growth_numel,), generator=generator).float())
    assert topology.step() is not None
    read = trainer.backend.access.read
    with torch.no_grad():
        masks = {f"{name}.mask": read(layer.mask).numpy().tobytes() for name, layer in topology.layers.items()}
    trainer.checkpoint.close()
    return masks


def test_a_state_is_the_same_when_another_engine_loads_it(tmp_path: Path, digits: Path) -> None:
    """From 2 ranks of FSDP2 to one process and to 3 ranks of ZeRO-3, from there back to FSDP2, and on with training."""
    source, straight, back = tmp_path / "source", tmp_path / "straight", tmp_path / "back"
    saved = run_on_ranks(2, run, config_of(digits, source, "fsdp2", STOP))
    assert_same_state(saved, run_on_ranks(1, loaded, config_of(digits, source, "single", END)))
    on_zero3 = run_on_ranks(3, loaded, config_of(digits, source, "zero3", END), back / "checkpoints")
    assert_same_state(saved, on_zero3)
    assert_same_state(saved, run_on_ranks(2, loaded, config_of(digits, back, "fsdp2", END)))

    tensors, statistics = saved[0].tensors, whole_statistics(saved)
    assert all(np.abs(tensors[name]).max() > 0 for name in tensors if name.endswith((":exp_avg", ":exp_avg_sq")))
    marked = {name: int(np.unpackbits(bits).sum()) for name, bits in statistics.items()}
    for name in (name.removesuffix(".values") for name in tensors if name.endswith(".values")):
        num_active = tensors[f"{name}.values"].size
        # After the first update: of the first mask those that stayed, because they did, and those that left, because they were.
        assert marked[f"history/{name}"] == num_active
        assert marked[f"recently_grown/{name}"] > 0

    run_on_ranks(2, run, config_of(digits, straight, "fsdp2", END))
    run_on_ranks(3, resumed_run, config_of(digits, back, "zero3", END))
    run_on_ranks(1, resumed_run, config_of(digits, source, "single", END))
    assert losses_of(source) == pytest.approx(losses_of(straight), abs=1e-5)
    assert losses_of(back) == pytest.approx(losses_of(straight)[STOP:], abs=1e-5)


@pytest.mark.parametrize("engine", ["single", "fsdp2", "zero1", "zero3"])
def test_a_run_resumes_when_its_first_steps_were_all_skipped(tmp_path: Path, digits: Path, engine: str) -> None:
    """Such a checkpoint holds no moments, for optimizers make them at the first step that they take."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    world_size = 1 if engine == "single" else 2
    ended = run_on_ranks(world_size, run_with_skipped_steps, config_of(digits, straight, engine, END))
    run_on_ranks(world_size, run_with_skipped_steps, config_of(digits, stopped, engine, 2))
    resumed = run_on_ranks(world_size, resumed_run, config_of(digits, stopped, engine, END))
    assert metrics_of(stopped)[-1]["skipped_steps"] == 2
    assert losses_of_applied(stopped) == losses_of_applied(straight)
    assert_same_state(ended, resumed)


def run_with_skipped_steps(config: Config) -> State:
    """Its first two steps aren't finite."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=False)
    forward = trainer.backend.forward
    with patch.object(trainer.backend, "forward", lambda images: forward(images) * (torch.nan if trainer.step < 2 else 1)):
        trainer.run()
    return state_of(trainer)


def losses_of_applied(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir) if "loss" in line]
