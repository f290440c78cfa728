"""A run of a config, from its last checks to its exit status."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from svite_scale.checkpoint.directory import CHECKPOINTS, CheckpointDirectory
from svite_scale.checkpoint.load import counts_of_run
from svite_scale.config.schema import Config
from svite_scale.config.validate import validate
from svite_scale.cost.dry_run import describe
from svite_scale.engines.build import check_parallel
from svite_scale.errors import ConfigError, DivergedError
from svite_scale.runtime import ranks
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.ending import EXIT_FAILED, Failure, reporting
from svite_scale.runtime.preemption import StopAgreement
from svite_scale.runtime.signals import EXIT_PREEMPTED, Preempted, StopSignals
from svite_scale.runtime.watchdog import Watchdog
from svite_scale.runtime.world import World
from svite_scale.tracking.tracker import METRICS
from svite_scale.train.profile import parse_steps
from svite_scale.train.trainer import Trainer


def dry_run(config: Config, world_size: int, world: World) -> int:
    """Checks the config, and prints its plan for a number of ranks. Returns the exit status."""
    if world_size < 1:
        raise ConfigError("--ranks", world_size, "is no number of processes", "use at least 1")
    sparse = validate(config, world_size)
    if world.is_main:
        print(describe(config, world_size, sparse))
    return 0


def train(
    config: Config,
    world: World,
    signals: StopSignals,
    failure: Failure,
    *,
    resume: bool,
    auto_resume: bool,
    profile: str | None,
) -> int:
    """Checks everything that can be checked, then joins the process group and trains. Every rank calls it.

    Args:
        config: of the run.
        world: of this rank.
        signals: the signals that ask the run to stop.
        failure: reports an error.
        resume: resume from the newest checkpoint, which must exist.
        auto_resume: resume if the run has ever saved. Else start it, over the files of a run that never saved.
        profile: the optimizer steps to trace, as in :func:`~svite_scale.train.profile.parse_steps`; None traces none.

    Returns:
        The exit status.
    """
    saved = counts_of_run(Path(config.run_dir) / CHECKPOINTS) if resume or auto_resume else None
    validate(config, world.size, saved)
    profiled_steps = None if profile is None else parse_steps(profile)
    device = ranks.local_device(world)
    check_parallel(config.parallel, device, bf16=config.train.precision == "bf16", compile=config.train.compile)
    check_run_dir(config, resume or auto_resume)
    store = ranks.start(world, device, config.guard.hang_timeout_s)
    try:
        if auto_resume:
            resume = ranks.broadcast_from_main(world.is_main and has_saved(Path(config.run_dir)))
        return supervise(config, world, device, store, signals, failure, resume=resume, profile=profiled_steps)
    finally:
        # Leaving the group waits for the other ranks, and after an error they may be anywhere.
        if world.size == 1:
            ranks.stop()


def supervise(
    config: Config,
    world: World,
    device: torch.device,
    store: dist.Store,
    signals: StopSignals,
    failure: Failure,
    *,
    resume: bool,
    profile: range | None,
) -> int:
    """Trains under the watchdog; returns the exit status once this rank has left the process group."""
    activity, timeout = Activity(), config.guard.hang_timeout_s
    watchdog = None if timeout is None else Watchdog(store, world, activity, timeout)

    def report(error: BaseException) -> None:
        if watchdog:
            watchdog.find_gone(error)
        failure.report(error, activity)
        activity.leave()

    with watchdog or nullcontext():
        asked_to_stop = StopAgreement(signals, store, device)
        status = 0
        try:
            with reporting(report):
                Trainer(
                    config,
                    world,
                    device,
                    resume=resume,
                    profile=profile,
                    activity=activity,
                    asked_to_stop=asked_to_stop,
                    on_error=report,
                ).run()
        except Preempted as stop:
            signals.saved_status = status = EXIT_PREEMPTED
            if world.is_main:
                print(stop, file=sys.stderr)
        except DivergedError:
            status = EXIT_FAILED
        activity.leave(status or EXIT_FAILED)
        # All ranks together: when one has left, some launchers end the others, and the store is gone.
        dist.barrier()
        ranks.stop()
        return status


def has_saved(run_dir: Path) -> bool:
    """Returns whether a run has ever saved, whatever became of its checkpoints. An interrupted save doesn't count."""
    metrics = run_dir / METRICS
    return holds_checkpoint(run_dir) or (metrics.exists() and b'"checkpoint_seconds"' in metrics.read_bytes())


def holds_checkpoint(run_dir: Path) -> bool:
    """Returns whether a run directory has a checkpoint, valid or not."""
    return bool(CheckpointDirectory(run_dir / CHECKPOINTS).named())


def check_run_dir(config: Config, resume: bool) -> None:
    """Refuses to write over another run.

    Raises:
        ConfigError: the directory holds a run and ``resume`` is false, or it can't be read.
    """
    run_dir = Path(config.run_dir)
    try:
        holds_run = (run_dir / METRICS).exists() or holds_checkpoint(run_dir)
    except OSError as error:
        raise ConfigError("run_dir", config.run_dir, f"can't be read ({error})", "restore it, or name another") from error
    if holds_run and not resume:
        raise ConfigError("run_dir", config.run_dir, "holds a run already", "add --resume to continue it, or name another")
