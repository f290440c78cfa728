"""Runs that start from weights: the first state on each engine, a resume without the file, and the dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from svite_scale.config.schema import Config
from svite_scale.models.dense import build_dense
from svite_scale.runtime.world import World
from svite_scale.saved_run import load_model, read_run
from svite_scale.train.trainer import Trainer
from tests.command_line import run_here
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, State, losses_of, resumed_run, run, state_of
from tests.tiny import tiny_config, write_config_file

PRUNED = ("sparsity.density=1.0", "sparsity.masks=from_weights")
UNITS = ("sparsity.structured.heads=0.5", "sparsity.structured.neurons=0.6")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    """The dense model's tensors; half of the weights of all linear layers but those of block 1 are 0."""
    config = tiny_config(Path("digits"), tmp_path_factory.mktemp("source") / "run")
    torch.manual_seed(1)
    model, generator = build_dense(config.model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "blocks.1." not in name:
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < 0.5)
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def weights(source: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.from_numpy(array) for name, array in source.items()}, path)
    return path


def begun(config: Config) -> State:
    """The state of a run before its first step. A collective."""
    return state_of(Trainer(config, World.from_environment(), torch.device("cpu"), resume=False))


@pytest.mark.parametrize(
    ("engine", "world_size", "precision"),
    [("single", 1, "fp32"), ("fsdp2", 2, "fp32"), ("zero3", 2, "fp32"), ("zero3", 2, "bf16")],
)
def test_every_engine_and_the_average_begin_with_the_weights_of_the_file(
    tmp_path: Path, digits: Path, weights: Path, source: dict[str, Any], engine: str, world_size: int, precision: str
) -> None:
    given = (f"model.weights={weights}", *PRUNED, "train.ema_decay=0.9", f"train.precision={precision}")
    states = run_on_ranks(world_size, begun, tiny_config(digits, tmp_path / "run", *ENGINES[engine], *given))
    for state in states:
        expected: dict[str, Any] = {}
        for name, array in source.items():
            is_sparse = name.endswith(".weight") and array.ndim > 1 and (array == 0).any()
            layer = name.removesuffix(".weight")
            if is_sparse:
                expected[f"{layer}.mask"] = np.packbits(array.ravel() != 0, bitorder="little")
            expected[f"{layer}.values" if is_sparse else name] = array[array != 0] if is_sparse else array
        assert sum(name.endswith(".mask") for name in expected) == 5
        averages = {f"{name}:ema": array for name, array in expected.items() if not name.endswith(".mask")}
        for name, array in (expected | averages).items():
            np.testing.assert_array_equal(state.tensors[name], array, err_msg=name)


def test_a_run_resumes_and_is_read_without_its_file(tmp_path: Path, digits: Path, weights: Path) -> None:
    """The topology moves after step 4: candidates of heads and neurons need the spread of the file's weights."""

    def config(name: str, engine: str, steps: int) -> Config:
        given = (f"model.weights={weights}", *PRUNED, *UNITS, "model.num_heads=8", f"train.max_steps={steps}")
        return tiny_config(digits, tmp_path / name, *ENGINES[engine], *given)

    run_on_ranks(1, run, config("straight", "single", 6))
    run_on_ranks(1, run, config("stopped", "single", 3))
    weights.unlink()
    states = run_on_ranks(2, resumed_run, config("stopped", "fsdp2", 6))
    assert losses_of(tmp_path / "stopped") == pytest.approx(losses_of(tmp_path / "straight"), abs=1e-5)
    model = load_model(read_run(tmp_path / "stopped"))
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), states[0].tensors[name], err_msg=name)


def test_the_dry_run_says_what_changes_and_refuses_what_doesnt_fit(
    tmp_path: Path, digits: Path, weights: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    start = ["--config", str(write_config_file(digits, tmp_path / "run", tmp_path / "c.yaml")), *PRUNED]
    fits = run_here(capsys, *start, f"model.weights={weights}", "model.image_size=16", "model.num_classes=12", "--dry-run")
    assert (fits.status, fits.out.count(f"\nweights             {weights}\n")) == (0, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{weights}: the head is new, for 12 classes; the file's has 10",
        f"{weights}: position embeddings are interpolated from 2 x 2 patches to 4 x 4",
    ]
    wrong = run_here(capsys, *start, f"model.weights={weights}", "model.depth=3")
    assert wrong.status == 2
    assert wrong.err.startswith(f"config error: model.weights = '{weights}': isn't of this vit_tiny_patch16_224: it has no bl")
    gone = run_here(capsys, *start, "model.weights=gone.pth", "--dry-run")
    assert (gone.status, gone.err[:58]) == (2, "config error: model.weights = 'gone.pth': is no file; chec")
    assert not (tmp_path / "run").exists()
