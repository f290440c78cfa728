"""Which keys of the config may change when a run resumes, and which are fixed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svite_scale.checkpoint.compatibility import check_same_run
from svite_scale.config.earlier import read_saved_config
from svite_scale.config.load import field_names, to_dict, to_yaml
from svite_scale.config.schema import Config
from svite_scale.errors import CheckpointError
from tests.command_line import run_here
from tests.runs import losses_of
from tests.tiny import write_config_file

MAY_CHANGE = {
    "run_dir",
    "model.activation_checkpointing",
    "model.weights",
    "model.init_gain",
    "sparsity.masks",
    "sparsity.init",
    *(f"data.{name}" for name in ("train", "val", "verify_checksums", "cache_dir", "cache_gb", "fetch_attempts", "workers")),
    *("data.max_damaged", "data.eval_crop"),
    *(f"train.{name}" for name in ("max_steps", "accumulation_steps", "precision", "compile", "clip_grad_norm")),
    *(f"train.{name}" for name in ("log_every", "eval_every_epochs", "eval_batch_size", "eval_ema")),
    *(f"checkpoint.{name}" for name in ("every_epochs", "every_steps", "keep_last", "keep_every_epochs")),
    *("checkpoint.background", "checkpoint.on_error", "parallel.backend", "parallel.zero_stage"),
    *(f"guard.{name}" for name in ("hang_timeout_s", "max_nonfinite_steps", "spike_factor", "max_rollbacks")),
    *("tracking.mlflow", "tracking.publish", "tracking.uri", "tracking.experiment"),
}
MUST_STAY = {
    "seed",
    *(f"model.{name}" for name in ("name", "num_classes", "image_size", "in_channels", "patch_size", "embed_dim", "depth")),
    *("model.num_heads", "model.drop_path"),
    *(f"sparsity.{name}" for name in ("density", "distribution", "power_scale", "densities", "block", "keep_dense", "method")),
    *(f"sparsity.structured.{name}" for name in ("heads", "neurons", "grow", "drop_fraction")),
    *(f"sparsity.tokens.{name}" for name in ("keep", "training_keep", "training_keep_until", "signal", "blocks", "mode")),
    *(f"sparsity.tokens.{name}" for name in ("keep_warmup", "temperature", "final_temperature")),
    *(f"sparsity.{name}" for name in ("random_share", "update_unit", "update_every", "update_start", "update_batch_size")),
    *(f"sparsity.{name}" for name in ("stop_fraction", "drop_schedule", "drop_fraction", "final_drop_fraction")),
    *(f"sparsity.{name}" for name in ("grow_window", "grow_by", "grown_moments", "grown_warmup_steps", "protect_grown")),
    *(f"distillation.{name}" for name in ("teacher", "checkpoint", "kind", "alpha", "temperature", "mean", "std")),
    *(f"optimizer.{name}" for name in ("name", "lr", "lr_batch_size", "weight_decay", "betas", "eps", "warmup_epochs")),
    *("optimizer.warmup_lr", "optimizer.min_lr", "train.epochs", "train.global_batch_size", "train.ema_decay"),
    *("data.shuffle_shards", "data.last_batch", "data.mean", "data.std", "data.max_pixels"),
    *(f"data.augment.{name}" for name in ("recipe", "auto_augment", "random_erasing", "mixup", "cutmix")),
    *("data.augment.label_smoothing", "data.augment.repeats"),
}
CONFIG = Config(run_dir="runs/a")


def saved_with(field: str, value: object) -> dict[str, Any]:
    """The config as a checkpoint keeps it, with another value of one field."""
    saved = copy.deepcopy(to_dict(CONFIG))
    *sections, name = field.split(".")
    part = saved
    for section in sections:
        part = part[section]
    part[name] = value
    return saved


def test_every_config_key_is_fixed_or_free() -> None:
    assert field_names() == MAY_CHANGE | MUST_STAY
    assert not MAY_CHANGE & MUST_STAY


@pytest.mark.parametrize("field", sorted(MUST_STAY))
def test_a_resume_is_refused_when_a_fixed_field_changes(field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^step-1 was saved with {field} = 'another', not .*; restore it, or start"):
        check_same_run(saved_with(field, "another"), CONFIG, Path("step-1"))


@pytest.mark.parametrize("field", sorted(MAY_CHANGE))
def test_a_resume_is_allowed_when_a_free_field_changes(field: str) -> None:
    check_same_run(saved_with(field, "another"), CONFIG, Path("step-1"))


def test_a_field_that_the_saved_run_did_not_have_counts_as_its_default() -> None:
    saved = to_dict(CONFIG)
    del saved["optimizer"], saved["model"]["drop_path"]
    check_same_run(saved, CONFIG, Path("step-1"))
    other = Config(run_dir="runs/a", seed=0)
    del saved["seed"]
    check_same_run(saved, other, Path("step-1"))
    with pytest.raises(CheckpointError, match=r"saved with seed = 0, not 3"):
        check_same_run(saved, Config(run_dir="runs/a", seed=3), Path("step-1"))


def test_a_run_saved_before_init_was_an_option_started_from_dense_values(tmp_path: Path) -> None:
    text = to_yaml(CONFIG)
    assert text.count("  init: fan_in\n") == 1
    (tmp_path / "config.yaml").write_text(text.replace("  init: fan_in\n", ""))
    assert read_saved_config(tmp_path / "config.yaml").sparsity.init == "dense"


@pytest.mark.slow
def test_a_resumed_run_is_equal_with_recomputation_and_another_masks_file(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = {"blocks.0.mlp.fc1.weight": torch.zeros(128, 32, dtype=torch.uint8)}
    masks["blocks.0.mlp.fc1.weight"][::3, ::2] = 1
    for name in ("first", "second"):
        save_file(masks, tmp_path / f"{name}.safetensors")
    start = ["--config", str(write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml"))]
    sparse = [
        "sparsity.density=1.0",
        "sparsity.keep_dense=[patch_embed.proj, head, blocks.*.attn.*, blocks.1.*, blocks.0.mlp.fc2]",
    ]
    first, second = ([*sparse, f"sparsity.masks={tmp_path}/{name}.safetensors"] for name in ("first", "second"))
    assert run_here(capsys, *start, *first, f"run_dir={tmp_path}/straight", "train.max_steps=6").status == 0
    assert run_here(capsys, *start, *first, "train.max_steps=3").status == 0
    (tmp_path / "first.safetensors").unlink()
    again = ["--resume", "train.max_steps=6", "model.activation_checkpointing=true"]
    answer = run_here(capsys, *start, *second, *again)
    assert answer.status == 0, answer.err
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")
