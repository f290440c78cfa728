"""The options of the topology engine that a config describes."""

from __future__ import annotations

from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.errors import ConfigError
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.methods import METHODS
from svite_scale.sparsity.topology.schedule import UpdateSchedule


def check_topology(config: Config) -> None:
    """Checks what can be checked before the data is read: windows only where updates aren't counted in epochs.

    Raises:
        ConfigError: there is no such method, or a window doesn't fit between two updates.
    """
    sparsity = config.sparsity
    if sparsity.method not in METHODS:
        raise ConfigError("sparsity.method", sparsity.method, "is no method", f"use one of {', '.join(METHODS)}")
    if sparsity.update_unit == "steps":
        check_windows(sparsity, update_schedule(config, steps_per_epoch=1.0, total_steps=1).update_every)


def check_windows(sparsity: SparsityConfig, update_every: int) -> None:
    """Refuses windows that would reach from one update to the next, ``update_every`` optimizer steps later."""
    for name in ("grow_window", "grown_warmup_steps"):
        steps = getattr(sparsity, name)
        if steps > update_every:
            problem = f"is longer than the {update_every} steps between two updates"
            raise ConfigError(f"sparsity.{name}", steps, problem, "shorten it, or raise sparsity.update_every")


def topology_options(config: Config) -> TopologyOptions:
    """Which weights a run moves, and how."""
    sparsity = config.sparsity
    return TopologyOptions(
        method=sparsity.method,
        random_share=sparsity.random_share,
        seed=config.seed,
        grow_window=sparsity.grow_window,
        grow_by=sparsity.grow_by,
        grown_moments=sparsity.grown_moments,
        grown_warmup_steps=sparsity.grown_warmup_steps,
    )


def update_schedule(config: Config, steps_per_epoch: float, total_steps: int) -> UpdateSchedule:
    """When a run of ``total_steps`` optimizer steps updates its topology."""
    sparsity = config.sparsity
    if sparsity.update_unit == "epochs":
        scale = steps_per_epoch
    elif sparsity.update_batch_size is not None:
        scale = sparsity.update_batch_size / config.train.global_batch_size
    else:
        scale = 1.0
    return UpdateSchedule(
        total_steps=total_steps,
        update_every=max(1, round(sparsity.update_every * scale)),
        start_step=round(sparsity.update_start * scale),
        stop_fraction=sparsity.stop_fraction,
        drop_fraction=sparsity.drop_fraction,
        final_drop_fraction=sparsity.final_drop_fraction,
        drop_schedule=sparsity.drop_schedule,
    )
