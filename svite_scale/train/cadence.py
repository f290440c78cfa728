"""When a run logs, evaluates, saves, stops and ends."""

from __future__ import annotations

from dataclasses import dataclass

from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.data.order import EpochSteps
from svite_scale.train.options import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Due:
    """The actions that are due after one optimizer step.

    Attributes:
        log: a line of metrics.
        evaluate: an evaluation.
        save: a checkpoint.
        stop: the run stops before its end, because it was asked to.
        last: no step follows, so the checkpoint must reach the disk.
    """

    log: bool
    evaluate: bool
    save: bool
    stop: bool
    last: bool


@dataclass(frozen=True)
class Cadence:
    """Decides what is due after a step. A pure function of the step, the length of an epoch, and the config.

    Attributes:
        steps: the optimizer steps of an epoch.
        train: says when a run logs and evaluates, and how long it is.
        checkpoint: says when a run saves, and which checkpoints it keeps.
    """

    steps: EpochSteps
    train: TrainConfig
    checkpoint: CheckpointConfig

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all epochs. Schedules span these."""
        return self.steps.total(self.train.epochs)

    @property
    def last_step(self) -> int:
        """The step after which the run ends: ``train.max_steps``, if all epochs have more."""
        return min(self.total_steps, self.train.max_steps or self.total_steps)

    def due(self, step: int, *, stopping: bool) -> Due:
        """Returns what is due after ``step`` optimizer steps; ``stopping`` says that the run was asked to stop."""
        ends = step >= self.last_step
        stop = stopping and not ends
        # No evaluation before a stop: little time is left then.
        evaluate = not stop and (ends or self._ends_epoch(step, self.train.eval_every_epochs))
        every_steps = self.checkpoint.every_steps
        save = stop or ends or self._ends_epoch(step, self.checkpoint.every_epochs) or is_multiple(step, every_steps)
        log = save or evaluate or is_multiple(step, self.train.log_every)
        return Due(log=log, evaluate=evaluate, save=save, stop=stop, last=stop or ends)

    def keeps(self, step: int) -> bool:
        """True if the checkpoint of a step is kept for good."""
        return self._ends_epoch(step, self.checkpoint.keep_every_epochs)

    def _ends_epoch(self, step: int, every: int | None) -> bool:
        return every is not None and self.steps.ends_epoch(step, every)


def is_multiple(step: int, every: int | None) -> bool:
    """True if ``step`` is a multiple of ``every``; never, if that is None."""
    return every is not None and step % every == 0
