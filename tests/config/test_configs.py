"""The numbers of every file in configs/, against the paper's table and the names of the files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from svite_scale.config.load import read_config, to_yaml
from svite_scale.config.schema import Config
from svite_scale.config.validate import validate
from svite_scale.models.options import StructuredConfig

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET_SAMPLES = 1_281_167
LAST_UPDATE_TOLERANCE = 0.001


@dataclass(frozen=True)
class Row:
    """One size in the appendix of arXiv:2106.04533; ``lr`` is 5e-4 x batch / 512."""

    batch: int
    update_every: int
    last_update: int
    lr: float


PAPER = {
    "tiny": Row(batch=512, update_every=20_000, last_update=1_200_000, lr=5e-4),
    "small": Row(batch=512, update_every=15_000, last_update=1_200_000, lr=5e-4),
    "base": Row(batch=1024, update_every=7_000, last_update=600_000, lr=1e-3),
}
DENSITIES = {
    "deit_base_s40": 0.6,
    "deit_base_s50": 0.5,
    "deit_base_s60": 0.4,
    "deit_base_s70": 0.3,
    "deit_small_s50": 0.5,
    "deit_small_s60": 0.4,
    "deit_tiny_s30": 0.7,
    "deit_tiny_s40": 0.6,
    **{f"deit_{size}_block_s{100 - percent}": percent / 100 for size in ("small", "base") for percent in (50, 30, 10)},
    "deit_small_block_neurons_t50_s70": 0.3,
    **dict.fromkeys(("deit_small_t95_s50", "deit_small_t90_s50", "deit_small_t70_s50", "deit_small_t50_s50"), 0.5),
}
BLOCKS = {"small": (16, 16), "base": (32, 32)}
"""24 blocks on the short sides of each model."""

UNIT_DENSITIES = {"deit_tiny_structured_s30": 0.7, "deit_small_structured_s40": 0.6, "deit_base_structured_s40": 0.6}
"""The paper's, of heads and of neurons."""

FINETUNE = "finetune_deit_small_s50"
DEITS = [*DENSITIES, *UNIT_DENSITIES]


def config_of(name: str) -> Config:
    return read_config(CONFIGS / f"{name}.yaml")


def paper_row(name: str) -> Row:
    return PAPER[name.split("_")[1]]


def test_the_folder_holds_the_named_set() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*DEITS, FINETUNE, "quickstart", "glyphs"}


@pytest.mark.parametrize("name", [*DEITS, "quickstart"])
def test_every_config_is_possible_and_reads_back_equal(tmp_path: Path, name: str) -> None:
    config = config_of(name)
    validate(config, world_size=2)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "resolved.yaml") == config
    assert config.run_dir == f"runs/{name}"
    assert (config.parallel.backend, config.parallel.zero_stage) == ("deepspeed", 3)


@pytest.mark.parametrize("name", DENSITIES)
def test_model_and_density_are_what_the_name_says(name: str) -> None:
    config = config_of(name)
    assert config.model.name == f"deit_{name.split('_')[1]}_patch16_224"
    assert config.sparsity.density == DENSITIES[name]
    tokens = re.search(r"_t(\d+)", name)
    assert config.sparsity.tokens.keep == (int(tokens[1]) / 100 if tokens else None)
    assert config.sparsity.structured == StructuredConfig(neurons=config.sparsity.density if "_neurons" in name else 1.0)
    assert config.sparsity.block == (BLOCKS[name.split("_")[1]] if "_block" in name else (1, 1))


@pytest.mark.parametrize("name", UNIT_DENSITIES)
def test_heads_and_neurons_are_those_that_the_name_says(name: str) -> None:
    config, density = config_of(name), UNIT_DENSITIES[name]
    assert config.model.name == f"deit_{name.split('_')[1]}_patch16_224"
    assert name.endswith(f"_s{round(100 * (1 - density))}")
    assert config.sparsity.structured == StructuredConfig(heads=density, neurons=density, drop_fraction=0.5)
    assert config.sparsity.density == 1.0


@pytest.mark.parametrize("name", DEITS)
def test_the_topology_schedule_is_the_papers(name: str) -> None:
    config, row = config_of(name), paper_row(name)
    steps = config.train.epochs * IMAGENET_SAMPLES / config.train.global_batch_size
    assert config.train.epochs == 600
    assert config.sparsity.update_every == row.update_every
    assert math.isclose(config.sparsity.stop_fraction * steps, row.last_update, rel_tol=LAST_UPDATE_TOLERANCE)
    assert config.sparsity.distribution == "erk"
    # The paper's is that of single weights.
    drop_fraction = 0.5 if config.sparsity.block == (1, 1) else 0.1
    assert (config.sparsity.drop_fraction, config.sparsity.final_drop_fraction) == (drop_fraction, 0.005)


@pytest.mark.parametrize("name", DEITS)
def test_the_learning_rate_scales_with_the_batch(name: str) -> None:
    config, row = config_of(name), paper_row(name)
    assert config.train.global_batch_size == row.batch
    assert config.optimizer.lr_batch_size is not None
    scaled = config.optimizer.lr * config.train.global_batch_size / config.optimizer.lr_batch_size
    assert math.isclose(scaled, row.lr)


@pytest.mark.parametrize("name", DEITS)
def test_the_rest_of_the_recipe_is_deits(name: str) -> None:
    config = config_of(name)
    optimizer, augment = config.optimizer, config.data.augment
    assert (optimizer.name, optimizer.weight_decay, optimizer.warmup_epochs) == ("adamw", 0.05, 5.0)
    assert (optimizer.warmup_lr, optimizer.min_lr) == (1e-6, 1e-5)
    assert (augment.recipe, augment.auto_augment, augment.repeats) == ("deit", "rand-m9-mstd0.5-inc1", 3)
    assert (augment.random_erasing, augment.mixup, augment.cutmix, augment.label_smoothing) == (0.25, 0.8, 1.0, 0.1)
    assert (config.model.drop_path, config.model.num_classes, config.model.image_size) == (0.1, 1000, 224)
    assert (config.train.precision, config.checkpoint.every_epochs) == ("bf16", 10)
    assert (config.train.ema_decay, config.train.eval_ema) == (0.99996, True)
    assert config.train.clip_grad_norm is None


@pytest.mark.parametrize("name", DEITS)
def test_the_head_of_a_config_names_its_own_command(name: str) -> None:
    assert f"deepspeed launch/train.py --config configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def test_the_fine_tuning_starts_from_weights_and_updates_its_topology_thirty_times() -> None:
    config = config_of(FINETUNE)
    assert config.model.weights is not None
    config = replace(config, model=replace(config.model, weights=None))  # the file isn't here
    validate(config, world_size=2)
    steps = config.train.epochs * (IMAGENET_SAMPLES // config.train.global_batch_size)
    assert steps == 75_060
    assert config.sparsity.stop_fraction * steps // config.sparsity.update_every == 30
    assert (config.run_dir, config.sparsity.density, config.model.name) == (f"runs/{FINETUNE}", 0.5, "deit_small_patch16_224")


def test_the_quick_start_updates_its_topology_several_times() -> None:
    config = config_of("quickstart")
    steps = config.train.epochs * 4_000 // config.train.global_batch_size
    assert config.sparsity.density == 0.3
    assert config.sparsity.stop_fraction * steps // config.sparsity.update_every >= 5
