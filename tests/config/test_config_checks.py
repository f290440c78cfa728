"""What no single field can tell: each impossible combination names a field, its value and the remedy."""

from __future__ import annotations

import pytest

from svite_scale.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SparsityConfig,
    StructuredConfig,
    TokensConfig,
    TrainConfig,
)
from svite_scale.config.validate import check_config
from svite_scale.errors import ConfigError

TWO_RANKS = ParallelConfig(backend="ddp")
MISTAKES = [
    (
        Config(run_dir="r", parallel=TWO_RANKS, train=TrainConfig(global_batch_size=9)),
        "train.global_batch_size = 9: is not divisible by world size (2) x train.accumulation_steps (1); use a multiple of 2",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, train=TrainConfig(global_batch_size=4, accumulation_steps=4)),
        "train.global_batch_size = 4: is not divisible by world size (2) x train.accumulation_steps (4); use a multiple of 8",
    ),
    (
        Config(run_dir="r", parallel=ParallelConfig(backend="single")),
        "parallel.backend = 'single': trains on one process, but 2 were started; use ddp, fsdp2 or deepspeed",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(drop_fraction=0.1, final_drop_fraction=0.2)),
        "sparsity.final_drop_fraction = 0.2: is above sparsity.drop_fraction (0.1), but the schedule falls; lower it",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(densities={"*": 0.5}, masks="a")),
        "sparsity.masks = 'a': also says where the weights are, as sparsity.densities does; leave one of them out",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(density=0.3, densities={"*": 0.5})),
        "sparsity.density = 0.3: isn't used where sparsity.densities is given; set it to 1.0, or leave sparsity.densities out",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(density=0.3, masks="")),
        "sparsity.density = 0.3: isn't used where sparsity.masks is given; set it to 1.0, or leave sparsity.masks out",
    ),
    *(
        (Config(run_dir="r", parallel=TWO_RANKS, sparsity=sparsity), f"sparsity.{message}; leave it out")
        for sparsity, message in (
            (
                SparsityConfig(density=0.3, distribution="er", power_scale=2.0),
                "power_scale = 2.0: is only for a sparsity.density that is spread by erk",
            ),
            (
                SparsityConfig(densities={"*": 0.3}, power_scale=2.0),
                "power_scale = 2.0: is only for a sparsity.density that is spread by erk",
            ),
            (
                SparsityConfig(densities={"*": 0.3}, distribution="uniform"),
                "distribution = 'uniform': isn't used where sparsity.densities is given",
            ),
            (SparsityConfig(masks="a", distribution="er"), "distribution = 'er': isn't used where sparsity.masks is given"),
            *(
                (
                    SparsityConfig(method=method, random_share=0.2),
                    f"random_share = 0.2: isn't used by sparsity.method={method}",
                )
                for method in ("svite", "set", "static", "dense")
            ),
            (
                SparsityConfig(structured=StructuredConfig(grow="paper")),
                "structured.grow = 'paper': isn't used where all heads and neurons are active",
            ),
            (
                SparsityConfig(drop_schedule="constant", final_drop_fraction=0.1),
                "final_drop_fraction = 0.1: isn't used by sparsity.drop_schedule=constant",
            ),
            *(
                (SparsityConfig(tokens=tokens), f"tokens.{message}: isn't used where sparsity.tokens.keep is null")
                for tokens, message in (
                    (TokensConfig(blocks=(0, 3)), "blocks = [0, 3]"),
                    (TokensConfig(mode="mask"), "mode = 'mask'"),
                    (TokensConfig(temperature=5.0), "temperature = 5.0"),
                    (TokensConfig(final_temperature=1.0), "final_temperature = 1.0"),
                )
            ),
        )
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(update_every=2.5)),
        "sparsity.update_every = 2.5: is no whole number of steps; round it, or set sparsity.update_unit=epochs",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(update_start=0.5)),
        "sparsity.update_start = 0.5: is no whole number of steps; round it, or set sparsity.update_unit=epochs",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(update_unit="epochs", update_batch_size=512)),
        "sparsity.update_batch_size = 512: scales updates by steps, but sparsity.update_unit is epochs, which scale by "
        "themselves; leave it null",
    ),
    *(
        (Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(tokens=tokens)), message)
        for tokens, message in (
            (
                TokensConfig(keep=98.5),
                "sparsity.tokens.keep = 98.5: is no whole number of tokens; round it, or use a share of at most 1",
            ),
            (
                TokensConfig(keep=99.0, blocks=(0, 3)),
                "sparsity.tokens.keep = 99.0: is a count, which only the first of 2 selectors would bring the tokens down to; "
                "use a share, or one block in sparsity.tokens.blocks",
            ),
            *(
                (
                    TokensConfig(blocks=blocks),
                    f"sparsity.tokens.blocks = {list(blocks)}: doesn't name blocks in ascending order, each once; "
                    "use for example [0]",
                )
                for blocks in ((), (3, 0), (1, 1))
            ),
            (
                TokensConfig(temperature=0.05),
                "sparsity.tokens.final_temperature = 0.1: is above sparsity.tokens.temperature (0.05), but the temperature "
                "falls; lower it",
            ),
        )
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, model=ModelConfig(in_channels=1)),
        "data.mean = [0.485, 0.456, 0.406]: has 3 entries for 1 channels; give one number per channel",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, data=DataConfig(std=(0.2, 0.0, 0.2))),
        "data.std = [0.2, 0.0, 0.2]: pixels are divided by it; use numbers above 0",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, optimizer=OptimizerConfig(betas=(0.9, 1.0))),
        "optimizer.betas = [0.9, 1.0]: is outside [0, 1); use for example [0.9, 0.999]",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, optimizer=OptimizerConfig(warmup_epochs=5), train=TrainConfig(epochs=4)),
        "optimizer.warmup_epochs = 5: is longer than train.epochs (4); shorten it",
    ),
    (
        Config(
            run_dir="r",
            parallel=TWO_RANKS,
            data=DataConfig(augment=AugmentConfig(cutmix=1.0)),
            train=TrainConfig(global_batch_size=6),
        ),
        "data.augment.cutmix = 1.0: mixes samples in pairs, but a micro-batch has 3; "
        "make train.global_batch_size / (world size x train.accumulation_steps) even",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, train=TrainConfig(ema_decay=1.0)),
        "train.ema_decay = 1.0: never lets the average move; use a number below 1",
    ),
    (
        Config(run_dir="r", parallel=TWO_RANKS, train=TrainConfig(eval_ema=True)),
        "train.eval_ema = True: evaluates an average that isn't kept; set train.ema_decay, 0.9999 say",
    ),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES, ids=[message.split(" =")[0] for _, message in MISTAKES])
def test_an_impossible_combination_is_one_line(config: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config, world_size=2)
    assert str(caught.value) == message


def test_what_fits_passes() -> None:
    config = Config(run_dir="r", parallel=TWO_RANKS, train=TrainConfig(global_batch_size=24, accumulation_steps=3))
    check_config(config, world_size=2)
    assert config.micro_batch_size(2) == 4


@pytest.mark.parametrize(
    "sparsity",
    [
        SparsityConfig(drop_schedule="constant", drop_fraction=0.001),
        SparsityConfig(method="mixed", random_share=0.2),
        SparsityConfig(method="own", random_share=0.2),
        SparsityConfig(structured=StructuredConfig(neurons=0.5, grow="paper")),
        SparsityConfig(density=0.3, distribution="uniform"),
    ],
)
def test_what_has_an_effect_passes(sparsity: SparsityConfig) -> None:
    check_config(Config(run_dir="r", parallel=TWO_RANKS, sparsity=sparsity), world_size=2)


@pytest.mark.parametrize(
    "tokens",
    [
        TokensConfig(keep=0.9, blocks=(0, 3, 6)),
        TokensConfig(keep=99.0, blocks=(3,)),
        TokensConfig(keep=99.0, blocks=(0, 3), mode="mask"),
        TokensConfig(keep=1.0, temperature=1.0, final_temperature=1.0),
    ],
)
def test_tokens_that_fit_pass(tokens: TokensConfig) -> None:
    check_config(Config(run_dir="r", parallel=TWO_RANKS, sparsity=SparsityConfig(tokens=tokens)), world_size=2)
