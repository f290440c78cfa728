"""Everything that can be checked before a run joins its process group, or is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svite_scale.config.schema import Config
from svite_scale.errors import ConfigError
from svite_scale.models.dense import blocks
from svite_scale.models.sparse import SparseModel, plan_sparse
from svite_scale.models.teacher import check_teacher
from svite_scale.options import in_section
from svite_scale.sparsity.topology.methods import find_method


def validate(config: Config, world_size: int | None, saved: Mapping[str, int] | None = None) -> SparseModel:
    """Checks a config; what a section can tell of itself was checked when it was made.

    Args:
        config: of the run.
        world_size: ranks that are to train; None leaves out what depends on them.
        saved: active weights of the checkpoint that the run resumes from; see
            :func:`~svite_scale.models.sparse.build_sparse`. None for a new run.

    Returns:
        The model on the meta device, and what is sparse in it.

    Raises:
        ConfigError: the first mistake.
    """
    if world_size is not None:
        check_world_size(config, world_size)
    for section, mean, std in (("data", config.data.mean, config.data.std), *_of_the_teacher(config)):
        check_normalisation(section, mean, std, config.model.in_channels)
    epochs, warmup = config.train.epochs, config.optimizer.warmup_epochs
    if warmup > epochs:
        raise ConfigError("optimizer.warmup_epochs", warmup, f"is longer than train.epochs ({epochs})", "shorten it")
    with in_section("sparsity"):
        find_method(config.sparsity.method)
        if config.sparsity.update_unit == "steps":  # where it is epochs, the data says how many steps they have
            config.sparsity.refuse_long_windows(config.update_schedule(steps_per_epoch=1.0, total_steps=1).update_every)
    check_teacher(config.distillation, config.data)
    planned = plan_sparse(config.model, config.sparsity, saved)
    if config.train.compile and not blocks(planned.model):
        problem = f"compiles a model block by block, but {config.model.name} has no list of blocks"
        raise ConfigError("train.compile", True, problem, "set it to false")
    return planned


def check_normalisation(section: str, mean: Sequence[float], std: Sequence[float], in_channels: int) -> None:
    """Checks that mean and std, of a section of the config, have one number per channel.

    Raises:
        ConfigError: one of them hasn't.
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != in_channels:
            problem = f"has {len(numbers)} entries for {in_channels} channels"
            raise ConfigError(f"{section}.{name}", list(numbers), problem, "give one number per channel")


def check_world_size(config: Config, world_size: int) -> None:
    """Checks what depends on the number of ranks.

    Raises:
        ConfigError: the first mistake.
    """
    micro_batch_size, augment = config.micro_batch_size(world_size), config.data.augment
    for name, alpha in (("mixup", augment.mixup), ("cutmix", augment.cutmix)):
        if alpha and micro_batch_size % 2:
            problem = f"mixes samples in pairs, but a micro-batch has {micro_batch_size}"
            remedy = "make train.global_batch_size / (world size x train.accumulation_steps) even"
            raise ConfigError(f"data.augment.{name}", alpha, problem, remedy)
    if config.parallel.backend == "single" and world_size > 1:
        problem = f"trains on one process, but {world_size} were started"
        raise ConfigError("parallel.backend", "single", problem, "use ddp, fsdp2 or deepspeed")


def _of_the_teacher(config: Config) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """The teacher's own normalisation, where the config has one."""
    mean, std = config.distillation.mean, config.distillation.std
    return [] if mean is None or std is None else [("distillation", mean, std)]
