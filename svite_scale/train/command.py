"""The training command: from arguments to an exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from svite_scale import distributed
from svite_scale.config import Config
from svite_scale.config_checks import check_config
from svite_scale.config_reader import read_config
from svite_scale.distributed import World
from svite_scale.errors import ConfigError, SviteScaleError
from svite_scale.models.teacher import check_teacher
from svite_scale.models.vit import check_model
from svite_scale.parallel.build import check_parallel
from svite_scale.train.plan import describe
from svite_scale.train.topology import check_method
from svite_scale.train.tracking import METRICS

EXIT_CONFIG, EXIT_FAILED = 2, 1


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/train.py``. Every rank calls it.

    Args:
        arguments: ``config``, ``overrides``, ``resume``, ``dry_run``, ``ranks``.

    Returns:
        The exit status: 0, 2 after a mistake in the config, 1 after another error. A mistake in the config is the same on every
        rank, so the main one prints it; other errors are printed where they happen.
    """
    world = World()
    try:
        world = World.from_environment()
        # All ranks build the same model; the main one says what is to be said of it.
        logging.getLogger("svite_scale").setLevel(logging.WARNING if world.is_main else logging.ERROR)
        config = read_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            return dry_run(config, world.size if arguments.ranks is None else arguments.ranks, world)
        return train(config, world, resume=arguments.resume)
    except ConfigError as error:
        if world.is_main:
            print(f"config error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except SviteScaleError as error:
        print(f"error on rank {world.rank}: {error}", file=sys.stderr)
        return EXIT_FAILED


def dry_run(config: Config, world_size: int, world: World) -> int:
    """Checks the config and prints its plan for that many ranks."""
    if world_size < 1:
        raise ConfigError("--ranks", world_size, "is no number of processes", "use at least 1")
    check_config(config, world_size)
    check_model(config.model)
    check_method(config.sparsity)
    check_teacher(config.distillation, config.data)
    if world.is_main:
        print(describe(config, world_size))
    return 0


def train(config: Config, world: World, *, resume: bool) -> int:
    """Checks all that can be checked, then joins the process group and trains."""
    check_config(config, world.size)
    check_model(config.model)
    check_method(config.sparsity)
    check_teacher(config.distillation, config.data)
    device = distributed.device_of(world)
    check_parallel(config.parallel, device, config.train.precision == "bf16")
    check_run_dir(config, resume)
    distributed.start(world, device)
    # Imported once the config is known to be good: an answer about a typing error shouldn't wait for it.
    from svite_scale.train.trainer import Trainer

    try:
        Trainer(config, world, device, resume=resume).run()
    finally:
        distributed.stop()
    return 0


def check_run_dir(config: Config, resume: bool) -> None:
    """Refuses to write over another run.

    Raises:
        ConfigError: the directory holds a run, and this isn't to resume it.
    """
    if not resume and (Path(config.run_dir) / METRICS).exists():
        raise ConfigError("run_dir", config.run_dir, "holds a run already", "add --resume to go on with it, or name another")
