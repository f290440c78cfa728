"""What no single field of a config can tell: fields that don't fit together."""

from __future__ import annotations

from svite_scale.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    DistillationConfig,
    OptimizerConfig,
    SparsityConfig,
    StructuredConfig,
    TokensConfig,
    TrainConfig,
)
from svite_scale.errors import ConfigError

WITHOUT_RANDOM_SHARE = ("svite", "set", "static", "dense")
"""Methods that don't read ``random_share``; one that somebody adds may."""


def check_config(config: Config, world_size: int) -> None:
    """Raises:
    ConfigError: the first impossible combination.
    """
    check_mixing(config.data.augment, config.micro_batch_size(world_size))
    check_for_any_ranks(config)
    if config.parallel.backend == "single" and world_size > 1:
        raise ConfigError(
            "parallel.backend",
            "single",
            f"trains on one process, but {world_size} were started",
            "use ddp, fsdp2 or deepspeed",
        )


def check_for_any_ranks(config: Config) -> None:
    """The part of :func:`check_config` that the number of ranks has no part in."""
    check_sparsity(config.sparsity)
    check_tokens(config.sparsity.tokens)
    check_data(config.data, config.model.in_channels)
    check_distillation(config.distillation, config.model.in_channels)
    check_optimizer(config.optimizer, config.train.epochs)
    check_ema(config.train)


def check_sparsity(sparsity: SparsityConfig) -> None:
    check_where(sparsity)
    if sparsity.method in WITHOUT_RANDOM_SHARE:
        refuse_changed("sparsity", sparsity, "random_share", f"isn't used by sparsity.method={sparsity.method}")
    if sparsity.structured.heads == sparsity.structured.neurons == 1.0:
        cause = "isn't used where all heads and neurons are active"
        refuse_changed("sparsity.structured", sparsity.structured, "grow", cause)
    if sparsity.drop_schedule == "constant":
        refuse_changed("sparsity", sparsity, "final_drop_fraction", "isn't used by sparsity.drop_schedule=constant")
    elif sparsity.final_drop_fraction > sparsity.drop_fraction:
        raise ConfigError(
            "sparsity.final_drop_fraction",
            sparsity.final_drop_fraction,
            f"is above sparsity.drop_fraction ({sparsity.drop_fraction}), but the schedule falls",
            "lower it",
        )
    if sparsity.update_unit == "epochs" and sparsity.update_batch_size is not None:
        raise ConfigError(
            "sparsity.update_batch_size",
            sparsity.update_batch_size,
            "scales updates by steps, but sparsity.update_unit is epochs, which scale by themselves",
            "leave it null",
        )
    for name, value in (("update_every", sparsity.update_every), ("update_start", sparsity.update_start)):
        if sparsity.update_unit == "steps" and not value.is_integer():
            raise ConfigError(
                f"sparsity.{name}", value, "is no whole number of steps", "round it, or set sparsity.update_unit=epochs"
            )


def check_where(sparsity: SparsityConfig) -> None:
    """Refuses two fields that each say where the active weights are, and one that another makes void."""
    given = {"densities": bool(sparsity.densities), "masks": sparsity.masks is not None}
    instead = [name for name, is_given in given.items() if is_given]
    if len(instead) == 2:
        raise ConfigError(
            "sparsity.masks",
            sparsity.masks,
            "also says where the weights are, as sparsity.densities does",
            "leave one of them out",
        )
    if instead and sparsity.density != 1.0:
        raise ConfigError(
            "sparsity.density",
            sparsity.density,
            f"isn't used where sparsity.{instead[0]} is given",
            f"set it to 1.0, or leave sparsity.{instead[0]} out",
        )
    if instead:
        refuse_changed("sparsity", sparsity, "distribution", f"isn't used where sparsity.{instead[0]} is given")
    if instead or sparsity.distribution != "erk":
        refuse_changed("sparsity", sparsity, "power_scale", "is only for a sparsity.density that is spread by erk")


def check_tokens(tokens: TokensConfig) -> None:
    """Checks what doesn't need the model; the rest is checked where the selectors are put into it."""
    if not tokens.blocks or list(tokens.blocks) != sorted(set(tokens.blocks)):
        raise ConfigError(
            "sparsity.tokens.blocks",
            list(tokens.blocks),
            "doesn't name blocks in ascending order, each once",
            "use for example [0]",
        )
    if tokens.final_temperature > tokens.temperature:
        raise ConfigError(
            "sparsity.tokens.final_temperature",
            tokens.final_temperature,
            f"is above sparsity.tokens.temperature ({tokens.temperature}), but the temperature falls",
            "lower it",
        )
    if tokens.keep is None:
        for name in ("blocks", "mode", "temperature", "final_temperature"):
            refuse_changed("sparsity.tokens", tokens, name, "isn't used where sparsity.tokens.keep is null")
        return
    if tokens.keep <= 1:
        return
    if not tokens.keep.is_integer():
        raise ConfigError(
            "sparsity.tokens.keep", tokens.keep, "is no whole number of tokens", "round it, or use a share of at most 1"
        )
    if tokens.mode == "gather" and len(tokens.blocks) > 1:
        raise ConfigError(
            "sparsity.tokens.keep",
            tokens.keep,
            f"is a count, which only the first of {len(tokens.blocks)} selectors would bring the tokens down to",
            "use a share, or one block in sparsity.tokens.blocks",
        )


def check_data(data: DataConfig, in_channels: int) -> None:
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != in_channels:
            raise ConfigError(
                f"data.{name}",
                list(values),
                f"has {len(values)} entries for {in_channels} channels",
                "give one number per channel",
            )
    if min(data.std) <= 0:
        raise ConfigError("data.std", list(data.std), "pixels are divided by it", "use numbers above 0")


def check_distillation(distillation: DistillationConfig, in_channels: int) -> None:
    for name, other in (("teacher", "checkpoint"), ("checkpoint", "teacher"), ("mean", "std"), ("std", "mean")):
        given = getattr(distillation, other)
        if getattr(distillation, name) is None and given is not None:
            raise ConfigError(
                f"distillation.{name}", None, f"is missing beside distillation.{other} ({given!r})", "give both or none"
            )
    for name, numbers in (("mean", distillation.mean), ("std", distillation.std)):
        if numbers is not None and len(numbers) != in_channels:
            raise ConfigError(
                f"distillation.{name}",
                list(numbers),
                f"has {len(numbers)} entries for {in_channels} channels",
                "give one number per channel",
            )
    if distillation.std is not None and min(distillation.std) <= 0:
        raise ConfigError("distillation.std", list(distillation.std), "pixels are divided by it", "use numbers above 0")
    if distillation.kind == "hard":
        refuse_changed("distillation", distillation, "temperature", "isn't used by distillation.kind=hard")


def check_mixing(augment: AugmentConfig, micro_batch_size: int) -> None:
    for name, alpha in (("mixup", augment.mixup), ("cutmix", augment.cutmix)):
        if alpha and micro_batch_size % 2:
            raise ConfigError(
                f"data.augment.{name}",
                alpha,
                f"mixes samples in pairs, but a micro-batch has {micro_batch_size}",
                "make train.global_batch_size / (world size x train.accumulation_steps) even",
            )


def check_optimizer(optimizer: OptimizerConfig, epochs: int) -> None:
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError("optimizer.betas", list(optimizer.betas), "is outside [0, 1)", "use for example [0.9, 0.999]")
    if optimizer.warmup_epochs > epochs:
        raise ConfigError(
            "optimizer.warmup_epochs", optimizer.warmup_epochs, f"is longer than train.epochs ({epochs})", "shorten it"
        )


def check_ema(train: TrainConfig) -> None:
    if train.ema_decay is not None and train.ema_decay >= 1:
        raise ConfigError("train.ema_decay", train.ema_decay, "never lets the average move", "use a number below 1")
    if train.eval_ema and train.ema_decay is None:
        raise ConfigError("train.eval_ema", True, "evaluates an average that isn't kept", "set train.ema_decay, 0.9999 say")


def refuse_changed(
    prefix: str, section: SparsityConfig | StructuredConfig | TokensConfig | DistillationConfig, name: str, cause: str
) -> None:
    """Refuses a field that has no effect, unless it is at its default, which a file may spell out."""
    value, default = getattr(section, name), getattr(type(section), name)
    if value != default:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{prefix}.{name}", shown, cause, "leave it out")
