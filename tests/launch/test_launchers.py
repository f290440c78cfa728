"""One config, four launchers: each starts its engine, leaves the same files, and loses the same."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.engines.options import ParallelConfig
from svite_scale.tracking.options import TrackingConfig
from tests.command_line import Answer, run_command
from tests.ranks import free_port
from tests.runs import metrics_of
from tests.tiny import NUM_TRAIN, NUM_VAL, write_config_file

NUM_STEPS = 4 * NUM_TRAIN // 16
DENSITY = 15_245 / 25_408
"""The whole number next to 0.6 of the prunable weights: 16 x 32 of patches, 2 x 12 x 32^2 of blocks, 10 x 32 of the head."""

LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "{port}"],
    # With --cpu instead of --multi_gpu, accelerate starts one process, whatever --num_processes says.
    "accelerate": [
        *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "{port}"),
    ],
}
ENGINES = {
    "python": ParallelConfig(backend="single"),
    "torchrun": ParallelConfig(backend="fsdp2"),
    "deepspeed": ParallelConfig(backend="deepspeed", zero_stage=3),
    "accelerate": ParallelConfig(backend="ddp"),
}

on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="the deepspeed launcher can't hide GPUs from its ranks")
each_launcher = pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=on_cpus) if name == "deepspeed" else name for name in LAUNCHERS]
)


def launch(launcher: str, *arguments: str) -> Answer:
    command = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    return run_command(*command, "launch/train.py", *arguments)


@lru_cache
def launched(launcher: str, digits: Path) -> tuple[Answer, Path]:
    """One training by one launcher, and its run directory; MLflow is on under plain python."""
    run_dir = digits / "runs" / launcher
    run_dir.parent.mkdir(exist_ok=True)
    path = write_config_file(digits, digits / "overridden", run_dir.with_suffix(".yaml"))
    engine = ENGINES[launcher]
    overrides = [f"run_dir={run_dir}", f"parallel.backend={engine.backend}", "checkpoint.every_epochs=2"]
    return launch(launcher, "--config", str(path), *overrides, f"tracking.mlflow={launcher == 'python'}"), run_dir


def expected_config(launcher: str, digits: Path, run_dir: Path) -> Config:
    config = read_config(run_dir.with_suffix(".yaml"))
    return replace(
        config,
        run_dir=str(run_dir),
        parallel=ENGINES[launcher],
        checkpoint=replace(config.checkpoint, every_epochs=2),
        tracking=TrackingConfig(mlflow=launcher == "python"),
    )


@each_launcher
def test_a_run_leaves_its_config_metrics_summary_and_checkpoints(digits: Path, launcher: str) -> None:
    answer, run_dir = launched(launcher, digits)
    assert answer.status == 0, answer.err
    files = {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints"}
    assert {path.name for path in run_dir.iterdir()} == files | (
        {"mlflow_run_id", "report", "export"} if launcher == "python" else set()
    )
    assert read_config(run_dir / "config.yaml") == expected_config(launcher, digits, run_dir)

    metrics = metrics_of(run_dir)
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    for line in metrics:
        assert line.keys() >= {"loss", "accuracy", "density", "samples_per_second", "drop_fraction", "grad_norm", "lr", "epoch"}
        assert line["density"] == DENSITY
        assert line["samples_per_second"] > 0
        assert (line["drop_fraction"] > 0) == (line["step"] <= 12)
    assert [line["step"] for line in metrics if "eval_accuracy" in line] == [4, 8, 12, 16]
    updates = {line["step"]: line for line in metrics if "dropped" in line}
    assert list(updates) == [4, 8, 12]
    assert all(0 <= line["regrown"] < line["dropped"] for line in updates.values())
    shares = [line["ever_active"] for line in updates.values()]
    assert DENSITY < shares[0] <= shares[1] <= shares[2] < 1

    summary = json.loads((run_dir / "summary.json").read_text())
    engine = ENGINES[launcher]
    assert (summary["steps"], summary["density"], summary["precision"], summary["device"]) == (
        NUM_STEPS,
        DENSITY,
        "fp32",
        "cpu",
    )
    assert (summary["backend"], summary["world_size"]) == (engine.backend, 1 if launcher == "python" else 2)
    assert summary["zero_stage"] == (engine.zero_stage if launcher == "deepspeed" else None)
    assert summary["eval_accuracy"] == metrics[-1]["eval_accuracy"]

    checkpoints = run_dir / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"owner", "step-00000008", "step-00000016"}
    assert json.loads((checkpoints / "step-00000008" / "run.json").read_text())["topology"]["steps"] == 8
    assert f"{run_dir}: 16 steps, test accuracy" in answer.err
    assert answer.err.count(f"{run_dir}: 16 steps") == 1, "one rank speaks"


@each_launcher
def test_a_run_says_what_it_trains_and_what_to_run_next(digits: Path, launcher: str) -> None:
    answer, run_dir = launched(launcher, digits)
    engines = {"python": "single", "torchrun": "fsdp2", "deepspeed": "deepspeed ZeRO-3", "accelerate": "ddp"}
    ranks = 1 if launcher == "python" else 2
    lines = [
        "model   vit_tiny_patch16_224, 8 px",
        # 10,163 weights are inactive.
        "active  16,375 of 26,538 parameters, density 0.6 of the prunable ones",
        f"engine  {engines[launcher]}, fp32",
        f"ranks   {ranks}, {ranks} on this machine, device cpu, threads on each: 1",
        f"data    {NUM_TRAIN} samples for training, {NUM_VAL} for evaluation",
        f"batch   16 samples, {16 // ranks} on each rank",
        "steps   16, 4 of 4 epochs",
        f"files   {run_dir}",
        f"python launch/evaluate.py --run {run_dir}",
        f"python launch/report.py --run {run_dir}",
        f"python launch/export.py --run {run_dir} --format timm --out {run_dir}/export/timm",
    ]
    for line in lines:
        assert answer.err.count(f"  {line}\n") == 1, line
    assert re.search(r"^  memory  [\d.]+ kB of training state on each rank, 0\.6\d\d of the dense twin's$", answer.err, re.M)
    assert answer.err.count("train: 16 of 16 steps (100%), ") == 1


@each_launcher
def test_every_launcher_trains_the_same(digits: Path, launcher: str) -> None:
    ours, theirs = (metrics_of(launched(name, digits)[1]) for name in (launcher, "python"))
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.3, "it learns"
    for name, tolerance in (("loss", 1e-3), ("grad_norm", 1e-2), ("lr", 1e-12), ("drop_fraction", 1e-12)):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], abs=tolerance), name
    for name in ("eval_loss", "dropped", "ever_active"):
        assert [line.get(name) for line in ours] == pytest.approx([line.get(name) for line in theirs], abs=1e-3), name


def test_mlflow_has_the_run_and_its_result(digits: Path) -> None:
    from mlflow import MlflowClient

    answer, run_dir = launched("python", digits)
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    assert f"watch the run with: mlflow ui --backend-store-uri {uri}" in answer.err
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("svite_scale")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (run_dir / "mlflow_run_id").read_text().strip()
    assert (run.info.run_name, run.info.status) == ("python", "FINISHED")
    assert {run.data.params[name] for name in ("sparsity.density", "train.epochs", "seed")} == {"0.6", "4", "5"}
    assert run.data.params["parallel.backend"] == "single"
    history = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "loss")}
    assert history == {line["step"]: pytest.approx(line["loss"]) for line in metrics_of(run_dir)}
    assert run.data.metrics["eval_accuracy"] == pytest.approx(metrics_of(run_dir)[-1]["eval_accuracy"])
    assert (run.data.tags["engine"], run.data.tags["world_size"]) == ("single", "1")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.yaml", "report", "export"}
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.source_run_id == run.info.run_id


def test_one_rank_reports_when_two_find_the_same_mistake(digits: Path, tmp_path: Path) -> None:
    path = write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")
    answer = launch("torchrun", "--config", str(path), "parallel.backend=ddp", "train.global_batch_size=15")
    assert answer.status != 0
    assert [line for line in (answer.out + answer.err).splitlines() if "global_batch_size" in line] == [
        "config error: train.global_batch_size = 15: is not divisible by world size (2) x train.accumulation_steps (1); "
        "use a multiple of 2"
    ]
    assert "svite_scale/" not in answer.err, "no traceback of ours"
    assert list(tmp_path.iterdir()) == [path]
