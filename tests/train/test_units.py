"""Runs whose heads and neurons move are the same on every engine, through updates, windows and a resume."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from tests import reference
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, State, assert_same_state, loaded, losses_of, metrics_of, resumed_run, run
from tests.tiny import tiny_config, write_digits

UNITS = (
    "sparsity.density=1.0",
    "sparsity.structured.heads=0.5",
    "sparsity.structured.neurons=0.6",
    "sparsity.structured.drop_fraction=0.5",
    "model.num_heads=8",
    "sparsity.grow_window=2",
    "sparsity.grown_warmup_steps=2",
    "train.global_batch_size=12",
)
"""64 samples are 5 steps an epoch, 20 in all: updates after steps 4, 8, 12 and 16, each with a growth window of two steps."""

SEED, HEADS, NEURONS = 5, 4, 76
"""The tiny config's seed, and the active heads of 8 and neurons of 128 in each block."""

SHARED = [("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero3", 2), ("zero3", 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    (folder / "digits").mkdir()
    write_digits(folder / "digits")
    return folder


@lru_cache
def ended(folder: Path, engine: str, world_size: int, *overrides: str) -> tuple[list[State], list[float]]:
    """The states of all ranks at the end of a run, and its losses."""
    run_dir = folder / "-".join([engine, str(world_size), *overrides]).replace("=", "-")
    states = run_on_ranks(world_size, run, tiny_config(folder / "digits", run_dir, *ENGINES[engine], *UNITS, *overrides))
    moved = [line for line in metrics_of(run_dir) if "neurons/grown" in line]
    assert [line["step"] for line in moved] == [4, 8, 12, 16]
    if not overrides:
        assert sum(line["neurons/grown"] for line in moved) > 30
        assert sum(line["heads/grown"] for line in moved) > 2
    for line in moved:
        fraction = reference.cosine_rate(0.5, 0.005, line["step"], 16)
        assert line["heads/drop_fraction"] == line["neurons/drop_fraction"] == pytest.approx(fraction)
        for metric in (metric for metric in line if metric.startswith("layers/dropped/")):
            layer = metric.removeprefix("layers/dropped/")
            num_active = HEADS if layer.endswith("heads") else NEURONS
            assert line[metric] == reference.num_units_moved(fraction, num_active, layer, line["step"], SEED), metric
    return states, losses_of(run_dir)


ACCUMULATING, PAPER = "train.accumulation_steps=2", "sparsity.structured.grow=paper"
PROTECTED = "sparsity.protect_grown=true"
CASES = [
    *((*engine, "") for engine in SHARED),
    *((*engine, ACCUMULATING) for engine in (("zero2", 2), ("fsdp2", 3))),
    *((*engine, PAPER) for engine in (("fsdp2", 2), ("zero3", 2))),
    *((*engine, PROTECTED) for engine in (("fsdp2", 3), ("zero3", 2))),
]
"""Each engine, FSDP2 and ZeRO-3 on three ranks too; and what averages or draws in another way on two engines each."""


@pytest.mark.parametrize(("engine", "world_size", "override"), CASES)
def test_masks_and_losses_equal_those_of_one_process(folder: Path, engine: str, world_size: int, override: str) -> None:
    overrides = (override,) if override else ()
    (single, *_), losses = ended(folder, "single", 1, *overrides)
    states, found = ended(folder, engine, world_size, *overrides)
    assert found == pytest.approx(losses, abs=1e-3)
    for state in states:
        for name in (name for name in single.tensors if name.endswith(".mask")):
            np.testing.assert_array_equal(state.tensors[name], single.tensors[name], err_msg=name)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_activation_checkpointing_changes_nothing(folder: Path, engine: str) -> None:
    states, losses = ended(folder, engine, 2)
    checkpointed, found = ended(folder, engine, 2, "model.activation_checkpointing=true")
    assert found == pytest.approx(losses, abs=1e-6)
    for name, tensor in states[0].tensors.items():
        np.testing.assert_allclose(checkpointed[0].tensors[name], tensor, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_bf16_trains_and_moves_units(folder: Path, engine: str) -> None:
    losses = ended(folder, "single", 1)[1]
    found = ended(folder, engine, 2, "train.precision=bf16")[1]
    assert found[:4] == pytest.approx(losses[:4], abs=2e-2), "before the first update"
    # A batch holds 12 samples: five steps together tell whether the loss falls.
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])


@pytest.mark.parametrize(
    ("engine", "world_size", "override"),
    [("single", 1, ()), ("fsdp2", 2, ()), ("zero3", 3, ()), ("fsdp2", 3, (PROTECTED,)), ("zero3", 2, (PROTECTED,))],
)
def test_run_resumes_exactly_when_it_stopped_within_a_growth_window(
    folder: Path, engine: str, world_size: int, override: tuple[str, ...]
) -> None:
    states, _ = ended(folder, engine, world_size, *override)
    stopped = folder / f"stopped-{engine}-{world_size}"
    overrides = (*ENGINES[engine], *UNITS, *override)
    run_on_ranks(world_size, run, tiny_config(folder / "digits", stopped, *overrides, "train.max_steps=7"))
    on_one = run_on_ranks(1, loaded, tiny_config(folder / "digits", stopped, *ENGINES["single"], *UNITS, *override))
    assert any(name.startswith("growth/") and np.abs(value).max() > 0 for name, value in on_one[0].statistics.items())
    assert_same_state(states, run_on_ranks(world_size, resumed_run, tiny_config(folder / "digits", stopped, *overrides)))
