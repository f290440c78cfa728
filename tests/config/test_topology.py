"""From a config to its topology engine: schedules in steps, epochs and samples; windows that don't fit; what is logged."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.config.validate import validate
from svite_scale.errors import ConfigError, OptionError
from svite_scale.models.options import ModelConfig, StructuredConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity.topology.methods import METHODS
from svite_scale.train.options import TrainConfig
from tests.command_line import run_here
from tests.ranks import run_on_ranks
from tests.runs import metrics_of, run
from tests.sparsity.packing import packed_layers
from tests.tiny import tiny_config, write_config_file

FIGURES = ("dropped", "grown", "regrown", "initial_survival", "ever_active", "drop_threshold", "grow_threshold")


def config_of(batch_size: int = 512, **sparsity: object) -> Config:
    return Config(
        run_dir="r",
        sparsity=SparsityConfig(**sparsity),
        train=TrainConfig(global_batch_size=batch_size),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("config", "every", "start"),
    [
        (config_of(update_every=7000.0, update_start=10.0), 7000, 10),
        (config_of(update_every=2.5, update_start=1.0, update_unit="epochs"), 250, 100),
        (config_of(update_every=0.001, update_unit="epochs"), 1, 0),
        (config_of(update_every=7000.0, update_start=100.0, update_batch_size=512), 7000, 100),
        (config_of(update_every=7000.0, update_start=100.0, update_batch_size=512, batch_size=2048), 1750, 25),
        (config_of(update_every=7000.0, update_batch_size=512, batch_size=256), 14000, 0),
    ],
)
def test_intervals_in_steps_epochs_and_samples(config: Config, every: int, start: int) -> None:
    schedule = config.update_schedule(steps_per_epoch=100, total_steps=50_000)
    assert (schedule.update_every, schedule.start_step, schedule.total_steps) == (every, start, 50_000)


def test_the_other_keys_are_handed_on() -> None:
    units = StructuredConfig(heads=0.5, drop_fraction=0.2)
    shape = {"stop_fraction": 0.6, "drop_fraction": 0.4, "final_drop_fraction": 0.1, "drop_schedule": "linear"}
    config = config_of(**shape, structured=units)
    schedule = config.update_schedule(steps_per_epoch=100, total_steps=1000)
    assert schedule.stop_step == 600
    assert schedule.drop_fraction_at(300) == pytest.approx(0.25)
    assert schedule.unit_drop_fraction_at(300) == pytest.approx(0.15)


def test_the_options_are_the_keys_of_the_same_names() -> None:
    given = {
        "method": "mixed",
        "random_share": 0.2,
        "grow_window": 3,
        "grow_by": "magnitude",
        "grown_moments": "zero",
        "grown_warmup_steps": 4,
        "protect_grown": True,
    }
    config = replace(config_of(**given), seed=7)
    assert asdict(config.topology_options()) == given | {"seed": 7, "optimizer_state": {}}


def test_an_unknown_method_is_refused() -> None:
    for method in METHODS:
        assert validate(config_of(method=method), world_size=None)
    with pytest.raises(OptionError, match=r"^method = 'rigl': is no method; use one of svite, set, mixed, "):
        config_of(method="rigl")


def test_a_run_trains_by_a_method_that_its_config_names_by_import_path(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        "from svite_scale.sparsity.options import Method\n"
        "from svite_scale.sparsity.topology.methods import gradient_magnitude, magnitude\n"
        "largest_first = Method(drop=lambda candidates: -magnitude(candidates), grow=gradient_magnitude)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    keys = ("sparsity.method=own:largest_first", "train.max_steps=4")
    assert run_here(capsys, "--config", str(path), *keys).status == 0
    # A single process drops the weights of largest magnitude: none of those that go is below one that stays.
    line = metrics_of(tmp_path / "run")[-1]
    assert line["dropped"] > 0
    assert line["layers/drop_threshold/blocks.0.attn.qkv"] < 0
    answer = run_here(capsys, "--config", str(path), "sparsity.method=own:smallest_first")
    assert answer.status == 2
    assert answer.err == (
        "config error: sparsity.method = 'own:smallest_first': can't be imported (AttributeError: module 'own' has no "
        "attribute 'smallest_first'); check the name, and that PYTHONPATH has its folder\n"
    )


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        run(config)
    return str(caught.value)


@pytest.mark.parametrize("field", ["grow_window", "grown_warmup_steps"])
def test_a_window_longer_than_the_interval_is_refused(tmp_path: Path, digits: Path, field: str) -> None:
    """By the trainer itself too, which alone knows how many steps an epoch has."""
    every = ("sparsity.update_unit=epochs", "sparsity.update_every=0.8")
    (message,) = run_on_ranks(1, refusal, tiny_config(digits, tmp_path / "run", f"sparsity.{field}=5", *every))
    assert message == (
        f"sparsity.{field} = 5: is longer than the 3 steps between two updates; shorten it, or raise update_every"
    )


@pytest.mark.parametrize("field", ["grow_window", "grown_warmup_steps"])
def test_a_window_in_steps_is_checked_before_anything_else(field: str) -> None:
    validate(config_of(update_every=4.0, **{field: 4}), world_size=None)
    validate(config_of(update_every=4.0, **{field: 8}, update_batch_size=512, batch_size=256), world_size=None)
    validate(config_of(update_every=4.0, update_unit="epochs", **{field: 5}), world_size=None)
    for config, steps, every in (
        (config_of(update_every=4.0, **{field: 5}), 5, 4),
        (config_of(update_every=4.0, **{field: 3}, update_batch_size=512, batch_size=1024), 3, 2),
    ):
        with pytest.raises(ConfigError, match=rf"^sparsity\.{field} = {steps}: is longer than the {every} steps between two"):
            validate(config, world_size=None)


def test_a_run_logs_every_figure_of_every_layer(tmp_path: Path, digits: Path) -> None:
    run_on_ranks(2, run, tiny_config(digits, tmp_path / "run", "parallel.backend=fsdp2", "train.max_steps=8"))
    lines = metrics_of(tmp_path / "run")
    updates = {int(line["step"]): line for line in lines if "dropped" in line}
    assert list(updates) == [4, 8]
    assert all(line["postponed_updates"] == 0 for line in lines)
    layers = packed_layers(build_sparse(tiny_config(digits, tmp_path / "same").model, SparsityConfig(density=0.6), 5)[0])
    assert len(layers) >= 8
    for step, line in updates.items():
        assert line["dropped"] == line["grown"] + line["regrown"]
        for name, layer in layers.items():
            assert line[f"layers/density/{name}"] == layer.num_active / layer.shape.numel()
            for figure in (
                "dropped",
                "grown",
                "regrown",
                "initial_survival",
                "ever_active",
                "drop_threshold",
                "grow_threshold",
            ):
                assert f"layers/{figure}/{name}" in line
            assert (f"layers/grown_survival/{name}" in line) == (step == 8 and updates[4][f"layers/grown/{name}"] > 0)


@pytest.mark.parametrize("method", ["static", "dense"])
def test_a_method_that_moves_nothing(tmp_path: Path, digits: Path, method: str) -> None:
    (state,) = run_on_ranks(1, run, tiny_config(digits, tmp_path / "run", f"sparsity.method={method}", "train.max_steps=5"))
    lines = metrics_of(tmp_path / "run")
    assert not any("dropped" in line for line in lines)
    assert all(line["drop_fraction"] == 0.0 for line in lines)
    masks = [name for name in state.tensors if name.endswith(".mask")]
    assert bool(masks) == (method == "static")
    assert lines[-1]["density"] == (1.0 if method == "dense" else pytest.approx(0.6, abs=1e-3))


def test_dense_is_the_dense_twin_whatever_else_is_said() -> None:
    model = ModelConfig(
        name="vit_tiny_patch16_224",
        num_classes=3,
        image_size=8,
        in_channels=1,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
    )
    dense, plan = build_sparse(model, SparsityConfig(method="dense", masks="no/such.file"), seed=0)
    twin, _ = build_sparse(model, SparsityConfig(density=1.0), seed=0)
    assert not packed_layers(dense)
    assert all(layer.density == 1.0 for layer in plan)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dense.parameters(), twin.parameters(), strict=True))
