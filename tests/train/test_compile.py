"""``train.compile``: the same training on every engine, compiled once, through topology updates with growth windows."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from svite_scale.config.schema import Config
from svite_scale.engines.backend import EngineOptions
from svite_scale.engines.build import build_backend, check_parallel
from svite_scale.engines.options import ParallelConfig
from svite_scale.errors import ConfigError
from svite_scale.models.dense import blocks, build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.runtime.world import World
from svite_scale.sparsity.packing import prunable_layers, sparsify
from svite_scale.train.trainer import Trainer
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, losses_of
from tests.sparsity.test_compiled_products import CountingBackend
from tests.tiny import tiny_config, write_digits

pytestmark = pytest.mark.slow

KINDS = {
    "weights": (),
    "blocks": ("sparsity.block=[16,4]",),
    "units": ("sparsity.density=1.0", "sparsity.structured.heads=0.5", "sparsity.structured.neurons=0.6", "model.num_heads=4"),
    "tokens": ("sparsity.tokens.keep=0.6", "model.activation_checkpointing=true", "train.ema_decay=0.9", "train.eval_ema=true"),
}
"""Overrides that make other parts of a model sparse."""

WINDOW = ("sparsity.grow_window=2", "train.accumulation_steps=2")
BF16 = "train.precision=bf16"
FIRST_EPOCH = 4
"""Steps up to the first evaluation, with the first topology update."""


class Result(NamedTuple):
    """What a rank saw."""

    graphs: list[int]
    """Compiled until each step."""
    breaks: int
    """Reasons why dynamo broke a graph."""
    limits: int
    """Functions that dynamo gave up, because they were compiled too often."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    (folder / "digits").mkdir()
    write_digits(folder / "digits")
    return folder


def train(config: Config, compiler: str = "aot_eager", resume: bool = False) -> Result:
    """Trains to the last step. A collective. ``compiler`` is the backend that the config compiles by, if it compiles."""
    torch.compiler.reset()
    counters.clear()
    backend = CountingBackend(compiler)
    torch.compiler.set_default_backend(backend)
    graphs = []

    class Counted(Trainer):
        def train_step(self) -> object:  # type: ignore[override]
            update = super().train_step()
            graphs.append(backend.graphs)
            return update

    try:
        Counted(config, World.from_environment(), torch.device("cpu"), resume=resume).run()
    finally:
        torch.compiler.set_default_backend(None)
    return Result(graphs, len(counters["graph_break"]), len(counters["recompile_limit"]))


@lru_cache
def losses(folder: Path, engine: str, world_size: int, *overrides: str) -> tuple[list[float], Result]:
    """The losses of a run, and what its first rank saw."""
    run_dir = folder / "-".join([engine, str(world_size), *overrides]).replace("=", "-")
    config = tiny_config(folder / "digits", run_dir, *ENGINES[engine], *WINDOW, *overrides)
    result, *_ = run_on_ranks(world_size, train, config)
    return losses_of(run_dir), result


CASES = [
    ("single", 1, "weights"),
    ("ddp", 2, "blocks"),
    ("fsdp2", 2, "units"),
    ("zero2", 2, "blocks"),
    ("zero2", 2, "tokens"),
    ("zero3", 2, "weights"),
]


@pytest.mark.parametrize(("engine", "world_size", "kind"), CASES)
def test_losses_equal_those_of_a_run_that_is_not_compiled(folder: Path, engine: str, world_size: int, kind: str) -> None:
    expected, eager = losses(folder, engine, world_size, *KINDS[kind])
    found, compiled = losses(folder, engine, world_size, *KINDS[kind], "train.compile=true")
    assert found == pytest.approx(expected, abs=1e-5)
    assert eager.graphs[-1] == 0
    assert compiled.graphs[0] > 0
    assert compiled.breaks == compiled.limits == 0
    assert compiled.graphs[FIRST_EPOCH] == compiled.graphs[-1], "later updates, windows and evaluations compile nothing"


@pytest.mark.parametrize("engine", ["fsdp2"])
def test_bf16_losses_are_close_to_those_of_a_run_that_is_not_compiled(folder: Path, engine: str) -> None:
    expected, _ = losses(folder, engine, 2, *KINDS["blocks"], BF16)
    found, compiled = losses(folder, engine, 2, *KINDS["blocks"], BF16, "train.compile=true")
    assert found == pytest.approx(expected, abs=2e-2)
    assert compiled.breaks == 0
    assert compiled.graphs[FIRST_EPOCH] == compiled.graphs[-1]


def test_a_run_resumes_compiled_from_a_checkpoint_of_one_that_is_not(folder: Path) -> None:
    expected, _ = losses(folder, "fsdp2", 2)
    run_dir, engine = folder / "resumed", (*ENGINES["fsdp2"], *WINDOW)
    run_on_ranks(2, train, tiny_config(folder / "digits", run_dir, *engine, "train.max_steps=6"))
    result, *_ = run_on_ranks(
        2, train, tiny_config(folder / "digits", run_dir, *engine, "train.compile=true"), "aot_eager", True
    )
    assert result.graphs[0] > 0
    assert losses_of(run_dir) == pytest.approx(expected, abs=1e-5)


def test_inductor_trains_alike(folder: Path) -> None:
    """The compiler that a run has. It takes half a minute, so all other tests replace it."""
    kinds = ("model.depth=1", "model.num_heads=4", "sparsity.structured.heads=0.5", "sparsity.block=[16,4]")
    runs = {compile: folder / f"inductor-{compile}" for compile in ("true", "false")}
    for compile, run_dir in runs.items():
        config = tiny_config(folder / "digits", run_dir, *WINDOW, *kinds, "train.max_steps=9", f"train.compile={compile}")
        run_on_ranks(1, train, config, "inductor")
    assert losses_of(runs["true"]) == pytest.approx(losses_of(runs["false"]), abs=1e-5)


def test_blocks_that_differ_are_all_compiled() -> None:
    """In counts and in drop path. Torch's limit on recompilations is 8 for all of them."""
    torch.manual_seed(0)
    model = build_dense(
        ModelConfig(
            name="vit_tiny_patch16_224",
            num_classes=4,
            image_size=16,
            in_channels=1,
            patch_size=8,
            embed_dim=8,
            depth=9,
            num_heads=1,
            drop_path=0.1,
        )
    )
    sparsify(model, densities={name: 0.3 + 0.01 * number for number, name in enumerate(prunable_layers(model))})
    options = EngineOptions(device=torch.device("cpu"), wrap_units=blocks(model), micro_batch_size=2, compile=True)
    torch.compiler.reset()
    counters.clear()
    backend = CountingBackend()
    torch.compiler.set_default_backend(backend)
    try:
        built = build_backend(ParallelConfig(), model, lambda module: torch.optim.SGD(trainable(module), 0.1), options)
        for _ in range(2):
            built.backward(built.forward(torch.randn(2, 1, 16, 16)).sum())
            built.step()
    finally:
        torch.compiler.set_default_backend(None)
    assert backend.graphs == 9
    assert not counters["recompile_limit"]


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError) as caught:
        check_parallel(ParallelConfig(), torch.device("cpu"), bf16=False, compile=True)
    problem = "needs a C++ compiler, and there is no no-such-compiler"
    assert str(caught.value) == f"train.compile = True: {problem}; install g++ (build-essential), or name another in CXX"
    check_parallel(ParallelConfig(), torch.device("cpu"), bf16=False, compile=False)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
