"""The training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from svite_scale.checkpoint.checkpoint import Checkpoint
from svite_scale.checkpoint.directory import CHECKPOINTS
from svite_scale.checkpoint.state import RunParts
from svite_scale.config.schema import Config
from svite_scale.data.loader import Batch
from svite_scale.data.randomness import seed_step
from svite_scale.data.transforms import DeviceTransform
from svite_scale.models.token_selector import token_selectors
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.ending import leave_to_the_caller, reporting
from svite_scale.runtime.preemption import never
from svite_scale.runtime.signals import Preempted
from svite_scale.runtime.world import World
from svite_scale.sparsity.topology.statistics import TopologyUpdate
from svite_scale.tracking.progress import Progress
from svite_scale.train.build import build_sparse_model, build_topology, fingerprint, open_data, open_tracker
from svite_scale.train.cadence import Cadence
from svite_scale.train.ema import Ema
from svite_scale.train.evaluate import evaluate
from svite_scale.train.guard import Guard
from svite_scale.train.loss import TrainingLoss
from svite_scale.train.messages import describe_end, describe_start, device_name
from svite_scale.train.metrics import SHOWN, MetricsAverage, flops_per_second, selector_metrics
from svite_scale.train.optimizer import build_schedule
from svite_scale.train.profile import TRACES, StepProfiler


class Trainer:
    """One run of a config. Every rank makes one and calls :meth:`run`; both are collectives.

    Attributes:
        step: optimizer steps done.
        resumed_step: the step of the checkpoint that was loaded; None for a new run.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        *,
        resume: bool,
        profile: range | None = None,
        activity: Activity | None = None,
        asked_to_stop: Callable[[], bool] = never,
        on_error: Callable[[BaseException], object] = leave_to_the_caller,
    ) -> None:
        """Builds all parts of the run.

        Args:
            config: of the run.
            world: this rank's.
            device: this rank's.
            resume: load the newest checkpoint.
            profile: the optimizer steps to trace, counted from 1; None traces none.
            activity: records the step and the phase of this rank, for the watchdog.
            asked_to_stop: called before the first step and after each step; True makes the run save and stop. It must return
                the same on all ranks.
            on_error: called with the error that ends training, before anything is closed: closing may wait for other ranks.

        Raises:
            ConfigError, DataError, CheckpointError: something that the config names can't be used.
        """
        self.config, self.world, self.device = config, world, device
        self.activity = activity or Activity()
        self.asked_to_stop, self.on_error = asked_to_stop, on_error
        self.run_dir = Path(config.run_dir)

        self.train_data, self.eval_data = open_data(config, world)
        self.train_transform = DeviceTransform(config.data, config.model.num_classes, device, training=True)
        self.eval_transform = DeviceTransform(config.data, config.model.num_classes, device, training=False)
        steps_per_epoch = self.train_data.steps.per_epoch
        self.cadence = Cadence(self.train_data.steps, config.train, config.checkpoint)
        self.last_step, self.total_steps = self.cadence.last_step, self.cadence.total_steps

        self.guard = Guard(config.guard)
        self.loss = TrainingLoss(config, self.train_transform.loss_label_smoothing, device)
        skip_nonfinite = self.guard.skips_nonfinite
        self.backend, self.model_summary = build_sparse_model(
            config, world, device, skip_nonfinite=skip_nonfinite, resume=resume
        )
        self.selectors = token_selectors(self.backend.model)
        self.schedule = build_schedule(self.backend.optimizer, config, steps_per_epoch, self.total_steps)
        self.topology = build_topology(config, self.backend, steps_per_epoch, self.total_steps)
        decay = config.train.ema_decay
        self.ema = None if decay is None else Ema(self.backend.model, self.topology, decay)

        self.average = MetricsAverage(device)
        self.evaluation: dict[str, float] = {}
        self.checkpoint = Checkpoint(
            self.run_dir / CHECKPOINTS,
            config,
            RunParts(
                self.backend,
                self.topology,
                self.ema,
                stateful={"guard": self.guard, "damage": self.train_data.damage},
                samples=fingerprint(self.train_data),
            ),
            keeps=self.cadence.keeps,
        )
        self.resumed_step = self.load() if resume else None
        self.step = self.resumed_step or 0
        self.profiler = StepProfiler(profile, self.run_dir / TRACES, world.rank, done=self.step, last_step=self.last_step)

    def run(self) -> None:
        """Trains to the last step; evaluates and saves on the way and at the end. A collective: all ranks call it.

        Raises:
            Preempted: the run was asked to stop, and has saved.
            DivergedError: the gradients aren't finite, or the loss spikes, more often than the config allows.
        """
        started = time.perf_counter()
        with (
            open_tracker(self.config, self.resumed_step, self.world) as self.tracker,
            closing(self.checkpoint),
            self.profiler,
            reporting(self.on_error),
            Progress("train", self.last_step, "steps", done=self.step, enabled=self.world.is_main) as self.progress,
        ):
            self.begin()
            due = self.cadence.due(self.step, stopping=self.asked_to_stop())
            while self.step < self.last_step and not due.stop:
                update = self.train_step()
                due = self.cadence.due(self.step, stopping=self.asked_to_stop())
                if not (due.log or update):
                    continue
                metrics = self.reduce_metrics(update)
                if self.guard.is_spike(self.step, metrics.get("loss"), self.checkpoint.newest_valid):
                    self.roll_back(metrics["loss"], last=due.stop)
                    continue
                if due.save:
                    self.save(last=due.last)
                if due.evaluate:
                    metrics |= self.evaluate()
                self.log(metrics, update)
            if due.stop:
                self.tracker.status = "KILLED"
                raise Preempted(self.step)
            self.finish(started)

    def train_step(self) -> TopologyUpdate | None:
        """Takes one optimizer step, and then the topology update if one is due. A collective.

        Returns:
            What the topology update changed; None if there was none.
        """
        self.schedule.step_update(self.step)
        for batch in self.micro_batches():
            images, targets = self.train_transform(batch.images, batch.labels)
            loss, logits = self.loss(self.backend.forward(images), targets, images)
            selector_loss = self.loss.of_selectors(self.backend.model, targets)
            self.backend.backward(self.guard.watch(loss + selector_loss))
            self.average.add(loss.detach(), selector_loss.detach(), logits.detach(), batch)
        result = self.backend.step()
        self.step += 1
        self.average.end_step(result)
        if self.ema and result.applied:
            self.ema.update()
        update = self.topology.step(applied=result.applied)
        self.activity.end_step(self.step)
        self.profiler.end_step()
        self.progress.advance()
        self.guard.end_step(self.step, result.applied, self.checkpoint.newest_valid)
        return update

    def micro_batches(self) -> Iterator[Batch]:
        """Yields the micro-batches of the next step, and seeds the random generators for each."""
        for micro_batch in range(self.config.train.accumulation_steps):
            seed_step(self.config.seed, self.step, micro_batch, self.world.rank)
            self.activity.enter("data")
            with self.average.waiting_for_data():
                batch = next(self.batches)
            self.activity.enter("compute")
            yield batch

    def reduce_metrics(self, update: TopologyUpdate | None) -> dict[str, float]:
        """Returns the metrics since the last line, over all ranks. A collective.

        Raises:
            DataError: too many samples couldn't be decoded.
        """
        metrics = update.metrics() if update else {}
        metrics |= self.average.reduce(self.config.train.global_batch_size)
        metrics |= flops_per_second(self.model_summary.cost, metrics["samples_per_second"])
        self.train_data.damage.add(self.average.damaged, self.average.samples)
        metrics |= {
            "epoch": self.step / self.train_data.steps.per_epoch,
            "lr": self.backend.optimizer.param_groups[0]["lr"],
            "density": self.model_summary.density,
            "drop_fraction": self.topology.drop_fraction,
            "postponed_updates": self.topology.postponed,
            "damaged_samples": self.train_data.damage.damaged,
            "world_size": self.world.size,
            **self.guard.metrics(),
        }
        # topology.step() has already prepared the selectors for the next step.
        return metrics | selector_metrics(self.selectors, (self.step - 1) / self.total_steps)

    def log(self, metrics: dict[str, float], update: TopologyUpdate | None) -> None:
        """Writes one line of metrics, and one of the topology if it changed. A collective."""
        self.activity.enter("checkpoint")
        metrics |= self.checkpoint.metrics()
        self.average.restart()
        if update:
            self.tracker.log_topology(update.step, update.unit_masks)
        self.tracker.log(self.step, metrics)
        self.progress.show({label: metrics[name] for name, label in SHOWN.items() if name in metrics})

    def evaluate(self) -> dict[str, float]:
        """Evaluates the weights, and their moving average if the config asks for it. A collective."""
        parts = self.backend, self.eval_data, self.eval_transform, self.activity
        self.evaluation = evaluate(*parts)
        if self.ema and self.config.train.eval_ema:
            with self.ema.in_place_of_weights():
                self.evaluation |= evaluate(*parts, prefix="eval_ema_")
        return self.evaluation

    def save(self, *, last: bool) -> None:
        """Saves a checkpoint. A collective; ``last`` waits until it is on the disk."""
        self.activity.enter("checkpoint")
        self.checkpoint.save(self.step, last=last)

    def load(self) -> int:
        """Loads the newest checkpoint and returns its step. A collective."""
        model, batch_size = self.config.model, self.config.micro_batch_size(self.world.size)
        shape = (batch_size, model.in_channels, model.image_size, model.image_size)
        self.backend.init_optimizer_state(torch.zeros(shape, device=self.device))
        return self.checkpoint.load_newest()

    def roll_back(self, loss: float, *, last: bool) -> None:
        """Returns to the newest checkpoint after the loss spiked, and leaves out the data since then. A collective."""
        self.activity.enter("checkpoint")
        spiked_at, counted = self.step, self.guard.state_dict()
        self.step = self.checkpoint.load_newest()
        self.guard.load_state_dict(counted)
        self.guard.roll_back(spiked_at, self.step)
        self.batches = self.remaining_batches()
        self.tracker.rewind(self.step)
        self.progress.rewind(self.step)
        self.progress.write(f"loss {loss:.4g} at step {spiked_at} is a spike: back to step {self.step}, with other data")
        # Saved again, so that a restart skips the same data and knows the number of rollbacks.
        self.save(last=last)
        self.average.restart()

    def remaining_batches(self) -> Iterator[Batch]:
        """Returns the stream of batches for the steps that are left."""
        offset = self.guard.data_offset
        return self.train_data.batches(self.step + offset, self.last_step + offset)

    def begin(self) -> None:
        """Opens the stream of batches, records the topology of a new run, and says what runs. A collective."""
        self.batches = self.remaining_batches()
        if self.resumed_step is None:
            self.tracker.log_topology(self.step, self.topology.unit_masks())
        data = self.train_data, self.eval_data
        parts = self.config, self.world, self.device, self.model_summary, *data, self.cadence, self.resumed_step
        self.progress.write(describe_start(*parts))
        if self.tracker.ui_command:
            self.progress.write(f"watch the run with: {self.tracker.ui_command}")
        if self.profiler.note:
            self.progress.write(self.profiler.note)
        self.average.restart()

    def finish(self, started: float) -> None:
        """Writes the summary of a run that began at ``started`` of ``time.perf_counter()``; says what is next. A collective."""
        # If a finished run was resumed, no step has evaluated it.
        evaluation = self.evaluation or self.evaluate()
        self.progress.close()
        parallel = self.config.parallel
        self.tracker.summarize(
            {
                "steps": self.step,
                "seconds": time.perf_counter() - started,
                "density": self.model_summary.density,
                **evaluation,
                "backend": parallel.backend,
                "zero_stage": parallel.zero_stage if parallel.backend == "deepspeed" else None,
                "world_size": self.world.size,
                "device": device_name(self.device),
                "precision": self.config.train.precision,
            }
        )
        self.progress.write(f"{self.run_dir}: {self.step} steps, test accuracy {100 * evaluation['eval_accuracy']:.2f}%")
        self.progress.write(describe_end(self.config, self.tracker.ui_command))
