"""Commands that run on every rank of a job: from arguments to an exit status."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.errors import SviteScaleError
from svite_scale.runtime.ending import EXIT_CONFIG, Failure
from svite_scale.runtime.signals import StopSignals
from svite_scale.runtime.world import World
from svite_scale.tracking.mlflow_run import first_line
from svite_scale.tracking.options import TrackingConfig

FIRST_RANK_SPEAKS_S = 30.0
"""Seconds that the other ranks of a machine wait after a mistake in the config, for the first one to start and report it."""

Publish = Callable[[Path, TrackingConfig], None]
"""Publishes a finished run, given its directory and where MLflow is."""

logger = logging.getLogger("svite_scale")


def main(arguments: argparse.Namespace, publish: Publish) -> int:
    """Runs ``launch/train.py``. Every rank calls it.

    Args:
        arguments: ``config``, ``overrides``, ``resume``, ``auto_resume``, ``profile``, ``dry_run``, ``ranks``.
        publish: called by the main rank when the run has finished, unless its config says otherwise.

    Returns:
        The exit status: that of :func:`run_on_every_rank`, or 85 if a signal stopped the run and it has saved.
    """

    def command(world: World, failure: Failure) -> int:
        config = read_config(arguments.config, arguments.overrides)
        # What follows takes seconds to import, and the answer about a typing error shouldn't wait for it.
        if arguments.dry_run:
            from svite_scale.train.run import dry_run

            return dry_run(config, world.size if arguments.ranks is None else arguments.ranks, world)
        with StopSignals() as signals:
            from svite_scale.train.run import train

            options = {name: getattr(arguments, name) for name in ("resume", "auto_resume", "profile")}
            status = train(config, world, signals, failure, **options)
            if status == 0 and world.is_main:
                signals.saved_status = status  # a signal now ends only the publishing
                publish_finished(config, publish)
            return status

    return run_on_every_rank(command)


def publish_finished(config: Config, publish: Publish) -> None:
    """Publishes a run if its config says so. Whatever ends that is a warning, because the run itself has finished."""
    if not (config.tracking.mlflow and config.tracking.publish):
        return
    try:
        publish(Path(config.run_dir), config.tracking)
    except BaseException as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("%s isn't published (%s); train it again with --resume to repeat only this", config.run_dir, cause)


def run_on_every_rank(command: Callable[[World, Failure], int]) -> int:
    """Runs a command on this rank, and reports its error. Every rank calls it.

    Args:
        command: takes this rank's world, and what reports errors; returns the exit status.

    Returns:
        The command's exit status; 2 after a mistake in the config; 1 after any other error, which is printed when it happens.
    """
    failure = Failure(_explain)
    try:
        failure.world = world = World.from_environment()
        # All ranks warn of the same things, so only the main one does.
        logger.setLevel(logging.WARNING if world.is_main else logging.ERROR)
        return command(world, failure)
    except BaseException as error:
        status = failure.report(error)
        if status == EXIT_CONFIG and failure.world.local_rank > 0:
            import torch.distributed as dist

            # The launcher ends all ranks of the machine when one ends, perhaps before the first has reported.
            if not dist.is_initialized():
                time.sleep(FIRST_RANK_SPEAKS_S)
        return status


def _explain(error: BaseException) -> BaseException:
    """Returns a DataError instead of torch's error about a loader process."""
    if isinstance(error, SviteScaleError):
        return error
    from svite_scale.data.batches import explain_loader_error

    return explain_loader_error(error)
