"""What no single field can tell: each impossible combination names a field, its value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.config.validate import validate
from svite_scale.errors import ConfigError
from svite_scale.models.sparse import build_sparse
from tests.config.config_text import MINIMAL, written

MISTAKES = [
    (
        "train.global_batch_size=9",
        "train.global_batch_size = 9: is not divisible by world size (2) x train.accumulation_steps (1); use a multiple of 2",
    ),
    (
        "train.global_batch_size=4 train.accumulation_steps=4",
        "train.global_batch_size = 4: is not divisible by world size (2) x train.accumulation_steps (4); use a multiple of 8",
    ),
    (
        "parallel.backend=single",
        "parallel.backend = 'single': trains on one process, but 2 were started; use ddp, fsdp2 or deepspeed",
    ),
    (
        "sparsity.drop_fraction=0.1 sparsity.final_drop_fraction=0.2",
        "sparsity.final_drop_fraction = 0.2: is above drop_fraction (0.1), but the schedule falls; lower it",
    ),
    (
        "sparsity.densities={'*':0.5} sparsity.masks=a",
        "sparsity.masks = 'a': also says where the weights are, as densities does; leave one of them out",
    ),
    (
        "sparsity.density=0.3 sparsity.densities={'*':0.5}",
        "sparsity.density = 0.3: isn't used where densities is given; set it to 1.0, or leave densities out",
    ),
    (
        "sparsity.density=0.3 sparsity.masks=''",
        "sparsity.density = 0.3: isn't used where masks is given; set it to 1.0, or leave masks out",
    ),
    *(
        (f"sparsity.{overrides}".replace(" ", " sparsity."), f"sparsity.{message}; leave it out")
        for overrides, message in (
            (
                "density=0.3 distribution=er power_scale=2.0",
                "power_scale = 2.0: is only for a density that is spread by erk",
            ),
            ("densities={'*':0.3} power_scale=2.0", "power_scale = 2.0: is only for a density that is spread by erk"),
            ("densities={'*':0.3} distribution=uniform", "distribution = 'uniform': isn't used where densities is given"),
            ("masks=a distribution=er", "distribution = 'er': isn't used where masks is given"),
            *(
                (f"method={method} random_share=0.2", f"random_share = 0.2: isn't used by method={method}")
                for method in ("svite", "set", "static", "dense")
            ),
            ("structured.grow=paper", "structured.grow = 'paper': isn't used where all heads and neurons are active"),
            (
                "structured.drop_fraction=0.5",
                "structured.drop_fraction = 0.5: isn't used where all heads and neurons are active",
            ),
            (
                "drop_schedule=constant final_drop_fraction=0.1",
                "final_drop_fraction = 0.1: isn't used by drop_schedule=constant",
            ),
            *(
                (f"tokens.{given}", f"tokens.{message}: isn't used where keep and training_keep are null")
                for given, message in (
                    ("signal=paper", "signal = 'paper'"),
                    ("keep_warmup=0.3", "keep_warmup = 0.3"),
                    ("training_keep_until=1", "training_keep_until = 1.0"),
                    ("blocks=[0,3]", "blocks = [0, 3]"),
                    ("mode=mask", "mode = 'mask'"),
                    ("temperature=5.0", "temperature = 5.0"),
                    ("final_temperature=1.0", "final_temperature = 1.0"),
                )
            ),
            *(
                (f"tokens.{choice} tokens.{given}", f"tokens.{message}")
                for choice, given, message in (
                    ("keep=0.5", "temperature=5.0", "temperature = 5.0: isn't used by the signal classifier"),
                    ("keep=0.5", "training_keep_until=1", "training_keep_until = 1.0: isn't used where training_keep is null"),
                    ("training_keep=0.5", "keep_warmup=0.3", "keep_warmup = 0.3: isn't used where keep is null"),
                    ("training_keep=0.5", "mode=mask", "mode = 'mask': saves nothing, which is all that training_keep is for"),
                    (
                        "training_keep=0.5",
                        "final_temperature=1",
                        "final_temperature = 1.0: isn't used by the signal classifier",
                    ),
                )
            ),
        )
    ),
    (
        "sparsity.tokens.keep=0.5 sparsity.tokens.training_keep=0.5",
        "sparsity.tokens.training_keep = 0.5: drops tokens in training only, but keep drops them always; leave one of them out",
    ),
    (
        "sparsity.tokens.training_keep=0.5 sparsity.tokens.signal=paper",
        "sparsity.tokens.signal = 'paper': is only for keep; use random or classifier with training_keep",
    ),
    (
        "sparsity.tokens.keep=0.5 sparsity.tokens.signal=random",
        "sparsity.tokens.signal = 'random': doesn't tell which tokens evaluation keeps; use it with training_keep",
    ),
    (
        "sparsity.update_every=2.5",
        "sparsity.update_every = 2.5: is no whole number of steps; round it, or set update_unit=epochs",
    ),
    (
        "sparsity.update_start=0.5",
        "sparsity.update_start = 0.5: is no whole number of steps; round it, or set update_unit=epochs",
    ),
    (
        "sparsity.update_unit=epochs sparsity.update_batch_size=512",
        "sparsity.update_batch_size = 512: scales updates by steps, but update_unit is epochs, which scale by themselves; "
        "leave it null",
    ),
    (
        "sparsity.tokens.keep=98.5",
        "sparsity.tokens.keep = 98.5: is no whole number of tokens; round it, or use a fraction of at most 1",
    ),
    (
        "sparsity.tokens.keep=99.0 sparsity.tokens.blocks=[0,3]",
        "sparsity.tokens.keep = 99.0: is a count, which only the first of 2 selectors would bring the tokens down to; "
        "use a fraction, or one block in blocks",
    ),
    *(
        (
            f"sparsity.tokens.blocks={blocks}".replace(" ", ""),
            f"sparsity.tokens.blocks = {blocks}: doesn't name blocks in ascending order, each once; use for example [0]",
        )
        for blocks in ([], [3, 0], [1, 1])
    ),
    (
        "sparsity.tokens.temperature=0.05",
        "sparsity.tokens.final_temperature = 0.1: is above temperature (0.05), but the temperature falls; lower it",
    ),
    (
        "model.in_channels=1",
        "data.mean = [0.485, 0.456, 0.406]: has 3 entries for 1 channels; give one number per channel",
    ),
    (
        "distillation.mean=[0.5] distillation.std=[0.5]",
        "distillation.mean = [0.5]: has 1 entries for 3 channels; give one number per channel",
    ),
    (
        "data.std=[0.2,0.0,0.2]",
        "data.std = [0.2, 0.0, 0.2]: is not above 0.0; use a list, each entry a number above 0.0",
    ),
    (
        "optimizer.betas=[0.9,1.0]",
        "optimizer.betas = [0.9, 1.0]: is not below 1.0; use a list of 2, each entry a number of at least 0.0 and below 1.0",
    ),
    (
        "optimizer.warmup_epochs=5 train.epochs=4",
        "optimizer.warmup_epochs = 5.0: is longer than train.epochs (4); shorten it",
    ),
    (
        "data.augment.cutmix=1.0 train.global_batch_size=6",
        "data.augment.cutmix = 1.0: mixes samples in pairs, but a micro-batch has 3; "
        "make train.global_batch_size / (world size x train.accumulation_steps) even",
    ),
    (
        "train.ema_decay=1.0",
        "train.ema_decay = 1.0: is not below 1.0; use a number of at least 0.0 and below 1.0 or null",
    ),
    ("train.eval_ema=true", "train.eval_ema = True: evaluates an average that isn't kept; set ema_decay, 0.9999 say"),
    ("model.name=vit_none", "model.name = 'vit_none': is no model that timm knows; see timm.list_models()"),
    (
        "sparsity.tokens.keep=300",
        "sparsity.tokens.keep = 300.0: only 197 tokens reach the selector; lower it",
    ),
    ("sparsity.structured.heads=0.1", "sparsity.structured.heads = 0.1: keeps none of 3 heads; raise it"),
    (
        "sparsity.density=0.5 sparsity.keep_dense=[heads]",
        "sparsity.keep_dense = 'heads': matches no prunable layer; use names such as blocks.6.attn.qkv",
    ),
    (
        "sparsity.method=no_such_module:a",
        "sparsity.method = 'no_such_module:a': can't be imported (ModuleNotFoundError: No module named 'no_such_module'); "
        "check the name, and that PYTHONPATH has its folder",
    ),
    (
        "train.compile=true model.name=vgg11",
        "train.compile = True: compiles a model block by block, but vgg11 has no list of blocks; set it to false",
    ),
    (
        "distillation.teacher=deit_nano distillation.checkpoint=a",
        "distillation.teacher = 'deit_nano': is no model that timm knows; see timm.list_models()",
    ),
]


def config_of(folder: Path, overrides: str) -> Config:
    return read_config(written(folder, MINIMAL), ["parallel.backend=ddp", *overrides.split()])


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[overrides for overrides, _ in MISTAKES])
def test_an_impossible_combination_is_one_line(tmp_path: Path, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config_of(tmp_path, overrides), world_size=2)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides", ["train.global_batch_size=9", "parallel.backend=single", "data.augment.mixup=1 train.global_batch_size=6"]
)
def test_what_depends_on_the_ranks_passes_where_their_number_is_open(tmp_path: Path, overrides: str) -> None:
    config = config_of(tmp_path, overrides)
    validate(config, world_size=None)
    with pytest.raises(ConfigError):
        validate(config, world_size=2)


@pytest.mark.parametrize(
    "overrides",
    [
        "train.global_batch_size=24 train.accumulation_steps=3",
        "sparsity.drop_schedule=constant sparsity.drop_fraction=0.001",
        "sparsity.method=mixed sparsity.random_share=0.2",
        "sparsity.structured.neurons=0.5 sparsity.structured.grow=paper sparsity.structured.drop_fraction=null",
        "sparsity.structured.heads=0.5 sparsity.density=0.5",
        "sparsity.density=0.3 sparsity.distribution=uniform",
        "sparsity.tokens.keep=0.9 sparsity.tokens.blocks=[0,3,6]",
        "sparsity.tokens.keep=99 sparsity.tokens.blocks=[3]",
        "sparsity.tokens.keep=99 sparsity.tokens.blocks=[0,3] sparsity.tokens.mode=mask",
        "sparsity.tokens.keep=1.0 sparsity.tokens.signal=paper sparsity.tokens.temperature=1.0",
        "sparsity.tokens.keep=0.5 sparsity.tokens.keep_warmup=0.3",
        "sparsity.tokens.training_keep=0.5 sparsity.tokens.training_keep_until=1.0 sparsity.tokens.signal=random",
    ],
)
def test_a_combination_that_has_an_effect_passes(tmp_path: Path, overrides: str) -> None:
    validate(config_of(tmp_path, overrides), world_size=2)


def test_a_model_is_checked_and_built_without_a_second_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[str] = []
    create = timm.create_model

    def recorded(*arguments: Any, **options: Any) -> nn.Module:
        model = create(*arguments, **options)
        created.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr(timm, "create_model", recorded)
    config = config_of(tmp_path, "model.depth=1 model.embed_dim=24 model.num_heads=3 sparsity.density=0.5")
    planned = validate(config, world_size=2)
    assert created == ["meta"]
    model, layers = build_sparse(config.model, config.sparsity, seed=0)
    assert created == ["meta", "cpu"]
    assert layers == planned.layers
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in planned.model.named_parameters()}
    assert all(parameter.is_meta for parameter in planned.model.parameters())


def test_the_micro_batch_is_the_global_one_over_ranks_and_accumulation_steps(tmp_path: Path) -> None:
    assert config_of(tmp_path, "train.global_batch_size=24 train.accumulation_steps=3").micro_batch_size(2) == 4


def test_reading_a_config_does_not_import_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run that came from somebody else can be read: docs/security.md."""
    (tmp_path / "harmful.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of(tmp_path, "sparsity.method=harmful:method model.depth=1 model.embed_dim=24 model.num_heads=3")
    build_sparse(config.model, config.sparsity, seed=0)
    with pytest.raises(SystemExit):
        validate(config, world_size=2)
