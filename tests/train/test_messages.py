"""The texts at the start and the end of a run; tests/launch/test_launchers.py sees those of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svite_scale.config.schema import Config
from svite_scale.cost.flops import count_flops
from svite_scale.cost.memory import model_sizes
from svite_scale.models.sparse import plan_sparse
from svite_scale.runtime.world import World
from svite_scale.sparsity.allocation.layer_plan import plan_density
from svite_scale.train.build import ModelSummary, open_data
from svite_scale.train.cadence import Cadence
from svite_scale.train.messages import describe_end, describe_start, in_bytes
from tests.tiny import tiny_config


def start_of(config: Config, resumed_step: int | None) -> dict[str, str]:
    """Returns the start of a run on 2 ranks of 4 on this machine, by the first word of each line."""
    model, layers = plan_sparse(config.model, config.sparsity)
    cost = count_flops(model, config.model.image_size)
    summary = ModelSummary(plan_density(layers), cost, model_sizes(model, cost))
    world, device = World(0, 4, 0, 2), torch.device("cpu")
    train_data, eval_data = open_data(config, world)
    cadence = Cadence(train_data.steps, config.train, config.checkpoint)
    text = describe_start(config, world, device, summary, train_data, eval_data, cadence, resumed_step)
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}


def test_the_start_names_ranks_batch_steps_and_the_step_that_a_run_resumes_after(digits: Path, tmp_path: Path) -> None:
    overrides = ("parallel.backend=deepspeed", "parallel.zero_stage=2", "train.precision=bf16", "train.accumulation_steps=2")
    start = start_of(tiny_config(digits, tmp_path / "run", *overrides, "train.max_steps=6"), resumed_step=4)
    assert start["engine"] == "deepspeed ZeRO-2, bf16"
    assert start["ranks"] == "4, 2 on this machine, device cpu, threads on each: 1"
    assert start["batch"] == "16 samples, 2 on each rank, 2 times"
    assert start["steps"] == "6, 1.5 of 4 epochs"
    assert start["files"] == f"{tmp_path}/run, resumed after step 4"


def test_the_start_compares_the_bytes_of_a_rank_with_those_of_the_dense_twin(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path / "run", "parallel.backend=ddp", "sparsity.density=0.25", "train.ema_decay=0.9")
    start = start_of(config, resumed_step=None)
    # 25,408 weights, of which a quarter is active, and 1,130 other parameters: value, gradient, two moments, average.
    active = 25_408 // 4 + 1130
    assert start["active"] == f"{active:,} of 26,538 parameters, density 0.25 of the prunable ones"
    # A mask bit for each weight; on each of 4 ranks a quarter of the statistics, which have two bits for an active one.
    expected = 20 * active + 25_408 / 8 + (25_408 + 25_408 / 4) / 8 / 4
    ratio = expected / (20 * 26_538)
    assert start["memory"] == f"{expected / 1000:.0f} kB of training state on each rank, {ratio:.3f} of the dense twin's"


def test_the_end_names_commands_that_a_shell_takes_and_a_form_that_the_model_has(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "my run"
    end = describe_end(tiny_config(digits, run_dir), None)
    assert f"python launch/evaluate.py --run '{run_dir}'\n" in end
    assert f"--run '{run_dir}' --format timm --out '{run_dir}'/export/timm" in end
    assert "compare runs" not in end
    end = describe_end(tiny_config(digits, run_dir, "sparsity.structured.neurons=0.5"), "mlflow ui")
    assert "--format sliced" in end
    assert end.endswith("  compare runs  mlflow ui")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.23 kB"), (45.6e9, "45.6 GB"), (2e19, "2e+04 PB")]
)
def test_in_bytes_chooses_a_unit(count: float, text: str) -> None:
    assert in_bytes(count) == text
