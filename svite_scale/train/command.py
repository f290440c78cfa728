"""The training command: from arguments to an exit status."""

from __future__ import annotations

import argparse
import logging
import time

from svite_scale.config.load import read_config
from svite_scale.errors import SviteScaleError
from svite_scale.runtime.ending import EXIT_CONFIG, Failure
from svite_scale.runtime.signals import StopSignals
from svite_scale.runtime.world import World

FIRST_RANK_SPEAKS_S = 30.0
"""Seconds that the other ranks of a machine wait after a mistake in the config, for the first one to start and report it."""


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/train.py``. Every rank calls it.

    Args:
        arguments: ``config``, ``overrides``, ``resume``, ``auto_resume``, ``profile``, ``dry_run``, ``ranks``.

    Returns:
        The exit status: 0; 2 after a mistake in the config; 85 if a signal stopped the run and it has saved; 1 after any other
        error, which is printed when it happens.
    """
    failure = Failure(_explain)
    try:
        failure.world = world = World.from_environment()
        # All ranks warn of the same things, so only the main one does.
        logging.getLogger("svite_scale").setLevel(logging.WARNING if world.is_main else logging.ERROR)
        config = read_config(arguments.config, arguments.overrides)
        # What follows takes seconds to import, and the answer about a typing error shouldn't wait for it.
        if arguments.dry_run:
            from svite_scale.train.run import dry_run

            return dry_run(config, world.size if arguments.ranks is None else arguments.ranks, world)
        with StopSignals() as signals:
            from svite_scale.train.run import train

            options = {name: getattr(arguments, name) for name in ("resume", "auto_resume", "profile")}
            return train(config, world, signals, failure, **options)
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
