"""The training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from svite_scale.checkpoint.checkpoint import Checkpoint
from svite_scale.checkpoint.directory import CHECKPOINTS
from svite_scale.checkpoint.state import RunState
from svite_scale.config.load import flatten_config, to_dict, to_yaml
from svite_scale.config.schema import Config
from svite_scale.data.loader import Batch
from svite_scale.data.transforms import DeviceTransform
from svite_scale.engines.backend import Backend, EngineOptions
from svite_scale.engines.build import build_backend
from svite_scale.models.dense import blocks
from svite_scale.models.sparse import build_sparse
from svite_scale.models.teacher import answer_twice
from svite_scale.models.token_selector import token_selectors
from svite_scale.options import in_section
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.ending import leave_to_the_caller, reporting
from svite_scale.runtime.preemption import Preempted, never
from svite_scale.runtime.ranks import World
from svite_scale.sparsity.allocation.layer_plan import plan_density
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.statistics import TopologyUpdate
from svite_scale.tracking.progress import Progress
from svite_scale.tracking.tracker import Tracker
from svite_scale.train.ema import Ema
from svite_scale.train.evaluate import evaluate, evaluate_ema
from svite_scale.train.guard import Guard, spread_nonfinite
from svite_scale.train.loss import TrainingLoss
from svite_scale.train.optimizer import build_optimizer, build_schedule
from svite_scale.train.randomness import seed_step
from svite_scale.train.samples import identity, open_data
from svite_scale.train.window import MetricsWindow


class Trainer:
    """One run of a config. Every rank makes one and calls :meth:`run`; both are collectives."""

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        *,
        resume: bool,
        activity: Activity | None = None,
        asked_to_stop: Callable[[], bool] = never,
        on_error: Callable[[BaseException], object] = leave_to_the_caller,
    ) -> None:
        """Builds everything.

        Args:
            config: of the run.
            world: this rank's.
            device: this rank's.
            resume: load the newest checkpoint.
            activity: is told what this rank is doing.
            asked_to_stop: called before the first step and after each; whether to save and stop there, the same on all ranks.
            on_error: called with what ends training, before anything is closed, which may wait for other ranks.

        Raises:
            ConfigError, DataError, CheckpointError: what the config names can't be used.
        """
        self.config, self.world, self.device = config, world, device
        self.activity = activity or Activity()
        self.asked_to_stop, self.on_error = asked_to_stop, on_error
        self.run_dir = Path(config.run_dir)
        self.train_data, self.eval_data = open_data(config, world)
        self.train_transform = DeviceTransform(config.data, config.model.num_classes, device, training=True)
        self.eval_transform = DeviceTransform(config.data, config.model.num_classes, device, training=False)
        steps_per_epoch = self.train_data.steps.per_epoch
        self.total_steps = self.train_data.steps.total(config.train.epochs)
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.loss = TrainingLoss(config, self.train_transform.loss_label_smoothing, device)
        self.backend, self.density = self._build_backend()
        self.selectors = token_selectors(self.backend.model)
        self.schedule = build_schedule(self.backend.optimizer, config, steps_per_epoch, self.total_steps)
        self.topology = self._build_topology(steps_per_epoch)
        self.guard = Guard(config.guard)
        self.ema = self._build_ema()
        self.checkpoint = Checkpoint(
            self.run_dir / CHECKPOINTS,
            config,
            RunState(
                self.backend,
                self.topology,
                self.ema,
                stateful={"guard": self.guard, "damage": self.train_data.damage},
                samples=identity(self.train_data),
            ),
            keeps=lambda step: self._ends_epoch(step, config.checkpoint.keep_every_epochs),
        )
        self.resumed_step = self._load() if resume else None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.topology.steps

    def run(self) -> None:
        """Trains to the last step, evaluating and saving on the way and at the end.

        Raises:
            Preempted: it was asked to stop, and has saved.
            DivergedError: gradients aren't finite, or the loss spikes, as often as the config allows.
        """
        started = time.perf_counter()
        with (
            self._tracker() as tracker,
            closing(self.checkpoint),
            reporting(self.on_error),
            Progress(self.last_step, self.step, enabled=self.world.is_main) as progress,
        ):
            if self.resumed_step is None:
                tracker.log_topology(self.step, self.topology.unit_masks())
            window = MetricsWindow(self.device)
            if tracker.ui_command:
                progress.write(f"watch the run with: {tracker.ui_command}")
            batches = self._batches()
            evaluation: dict[str, float] = {}
            stops = self.asked_to_stop()
            while self.step < self.last_step:
                if stops:
                    tracker.status = "KILLED"
                    raise Preempted(self.step)
                update = self._train_step(batches, window)
                metrics = update.metrics() if update else {}
                if update:
                    tracker.log_topology(update.step, update.unit_masks)
                progress.advance()
                stops = self.asked_to_stop() and self.step < self.last_step
                saves = stops or self._saves()
                # Who asks to stop gives little time.
                evaluates = not stops and self._is_due(self.config.train.eval_every_epochs)
                if not (metrics or evaluates or saves or self.step % self.config.train.log_every == 0):
                    continue
                metrics |= window.close(self.config.train.global_batch_size)
                self.train_data.damage.add(window.damaged, window.samples)
                metrics |= self._state_metrics()
                if self.guard.is_spike(self.step, metrics.get("loss"), self.checkpoint.newest_valid):
                    batches = self._roll_back(tracker, progress, metrics["loss"])
                    # Or the next start would meet the same data, and count anew how often it has gone back.
                    self.checkpoint.save(self.step, last=stops)
                    window.restart()
                    continue
                if saves:
                    self.activity.enter("checkpoint")
                    self.checkpoint.save(self.step, last=stops or self.step == self.last_step)
                if evaluates:
                    evaluation = self._evaluate()
                    metrics |= evaluation
                self.activity.enter("metrics")
                metrics |= self.checkpoint.metrics()
                window.restart()
                tracker.log(self.step, metrics)
                progress.show(metrics)
            # Where a finished run was resumed, no step evaluated it.
            evaluation = evaluation or self._evaluate()
            progress.close()
            tracker.summarize(self._summary(time.perf_counter() - started, evaluation))
            progress.write(f"{self.run_dir}: {self.step} steps, test accuracy {100 * evaluation['eval_accuracy']:.2f}%")

    def _tracker(self) -> Tracker:
        """Opens the run's files."""
        return Tracker(
            self.config.tracking,
            self.run_dir,
            self.resumed_step,
            config_text=to_yaml(self.config),
            parameters=flatten_config(to_dict(self.config)),
            enabled=self.world.is_main,
        )

    def _train_step(self, batches: Iterator[Batch], window: MetricsWindow) -> TopologyUpdate | None:
        """One optimizer step, and the topology update if one is due.

        Returns:
            What the topology update did; None where there was none.
        """
        self.schedule.step_update(self.step)
        for selector in self.selectors:
            selector.anneal(self.step / self.total_steps)
        for micro_batch in range(self.config.train.accumulation_steps):
            seed_step(self.config.seed, self.step, micro_batch, self.world.rank)
            self.activity.enter("waiting for data")
            batch = next(batches)
            self.activity.enter("forward")
            images, targets = self.train_transform(batch.images, batch.labels)
            loss, logits = self.loss(self.backend.forward(images), targets, images)
            self.activity.enter("backward")
            self.backend.backward(spread_nonfinite(loss) if self._skips_nonfinite else loss)
            window.add(loss.detach(), logits.detach(), batch)
        self.activity.enter("optimizer step")
        result = self.backend.step()
        window.step(result)
        if self.ema and result.applied:
            self.ema.update()
        self.activity.enter("topology update" if self.topology.next_update == self.step + 1 else "next step")
        update = self.topology.step(applied=result.applied)
        self.activity.end_step(self.step)
        self.guard.end_step(self.step, result.applied, self.checkpoint.newest_valid)
        return update

    def _batches(self) -> Iterator[Batch]:
        """What the remaining steps train on."""
        offset = self.guard.data_offset
        return self.train_data.batches(self.step + offset, self.last_step + offset)

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the weights, and of their average where the config asks for them. A collective."""
        metrics = evaluate(self.backend, self.eval_data, self.eval_transform, self.activity)
        if self.ema and self.config.train.eval_ema:
            metrics |= evaluate_ema(self.ema, self.backend, self.eval_data, self.eval_transform, self.activity)
        return metrics

    def _roll_back(self, tracker: Tracker, progress: Progress, loss: float) -> Iterator[Batch]:
        """Goes back to the newest checkpoint because of a loss; returns what to train on from there."""
        spiked_at, counted = self.step, self.guard.state_dict()
        self.activity.enter("rollback")
        self.checkpoint.load_newest()
        self.guard.load_state_dict(counted)
        self.guard.roll_back(spiked_at, self.step)
        tracker.rewind(self.step)
        progress.rewind(self.step)
        progress.write(f"loss {loss:.4g} at step {spiked_at} is a spike: back to step {self.step}, and on with other data")
        return self._batches()

    @property
    def _skips_nonfinite(self) -> bool:
        return self.config.guard.max_nonfinite_steps is not None

    def _build_backend(self) -> tuple[Backend, float]:
        """The wrapped model, and the active share of its prunable weights."""
        config = self.config
        model, plan = build_sparse(config.model, config.sparsity, config.seed)
        if config.distillation.teacher is not None:
            answer_twice(model)
        options = EngineOptions(
            device=self.device,
            wrap_units=blocks(model),
            micro_batch_size=config.micro_batch_size(self.world.size),
            accumulation_steps=config.train.accumulation_steps,
            bf16=config.train.precision == "bf16",
            clip_grad_norm=config.train.clip_grad_norm,
            skip_nonfinite=self._skips_nonfinite,
        )
        backend = build_backend(config.parallel, model, lambda module: build_optimizer(module, config.optimizer), options)
        return backend, plan_density(plan)

    def _build_topology(self, steps_per_epoch: float) -> TopologyEngine:
        """The engine that moves the model's weights; refuses windows that don't fit between two updates."""
        schedule, options = self.config.update_schedule(steps_per_epoch, self.total_steps), self.config.topology_options()
        with in_section("sparsity"):
            return TopologyEngine(self.backend.model, self.backend.access, schedule, options, group=dist.group.WORLD)

    def _build_ema(self) -> Ema | None:
        """The average of the weights, which then follows the topology; None where the config asks for none."""
        if self.config.train.ema_decay is None:
            return None
        return Ema(self.backend.model, self.topology, self.config.train.ema_decay)

    def _load(self) -> int:
        """Loads the newest checkpoint; returns its step."""
        model, size = self.config.model, self.config.micro_batch_size(self.world.size)
        images = torch.zeros(size, model.in_channels, model.image_size, model.image_size, device=self.device)
        self.backend.init_optimizer_state(images)
        return self.checkpoint.load_newest()

    def _saves(self) -> bool:
        """Whether a checkpoint is due after this step."""
        every_steps = self.config.checkpoint.every_steps
        return self._is_due(self.config.checkpoint.every_epochs) or (every_steps is not None and self.step % every_steps == 0)

    def _is_due(self, every_epochs: int | None) -> bool:
        """Whether something done every so many epochs, and at the end, is due after this step."""
        return self.step == self.last_step or self._ends_epoch(self.step, every_epochs)

    def _ends_epoch(self, step: int, every: int | None) -> bool:
        """Whether one of every so many epochs ends with a step; None is never."""
        return every is not None and self.train_data.steps.ends_epoch(step, every)

    def _state_metrics(self) -> dict[str, float]:
        return {
            "epoch": self.step / self.train_data.steps.per_epoch,
            "lr": self.backend.optimizer.param_groups[0]["lr"],
            "density": self.density,
            "drop_rate": self.topology.drop_fraction,
            "postponed_updates": self.topology.postponed,
            "damaged_samples": self.train_data.damage.damaged,
            **self.guard.metrics(),
            **self._token_metrics(),
        }

    def _token_metrics(self) -> dict[str, float]:
        """The temperature, which all selectors share, and how many tokens the last one lets pass; empty without selectors."""
        if not self.selectors:
            return {}
        last = self.selectors[-1]
        return {"temperature": last.temperature, "tokens": last.num_tokens}

    def _summary(self, seconds: float, evaluation: dict[str, float]) -> dict[str, object]:
        parallel = self.config.parallel
        return {
            "steps": self.step,
            "seconds": seconds,
            "density": self.density,
            **evaluation,
            "backend": parallel.backend,
            "zero_stage": parallel.zero_stage if parallel.backend == "deepspeed" else None,
            "world_size": self.world.size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "precision": self.config.train.precision,
        }
