"""The training run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from svite_scale.config import Config
from svite_scale.data import Batch, DeviceTransform, EvalData, TrainData
from svite_scale.data.index import largest_label, load_indexes
from svite_scale.distributed import World
from svite_scale.errors import ConfigError
from svite_scale.models.sparse_vit import build_sparse_vit
from svite_scale.models.teacher import answer_twice
from svite_scale.models.token_selector import token_selectors
from svite_scale.models.vit import blocks
from svite_scale.parallel.backend import Backend, EngineOptions
from svite_scale.parallel.build import build_backend
from svite_scale.sparsity.layer_plan import plan_density
from svite_scale.sparsity.topology_update import TopologyUpdate
from svite_scale.train.checkpoint import Checkpoint
from svite_scale.train.evaluate import evaluate
from svite_scale.train.loss import TrainingLoss
from svite_scale.train.optimizer import build_optimizer, build_schedule
from svite_scale.train.progress import Progress
from svite_scale.train.randomness import seed_step
from svite_scale.train.topology import build_topology
from svite_scale.train.tracking import Tracker
from svite_scale.train.window import MetricsWindow


class Trainer:
    """One run of a config. Every rank makes one and calls :meth:`run`; both are collectives."""

    def __init__(self, config: Config, world: World, device: torch.device, *, resume: bool) -> None:
        """Builds everything, and loads the newest checkpoint where ``resume`` says so.

        Raises:
            ConfigError, DataError, CheckpointError: what the config names can't be used.
        """
        self.config, self.world, self.device = config, world, device
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
        self.topology = build_topology(config, self.backend, steps_per_epoch, self.total_steps)
        self.checkpoint = Checkpoint(self.run_dir / "checkpoints", config, self.backend, self.topology)
        self.resumed_step = self._load() if resume else None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.topology.steps

    def run(self) -> None:
        """Trains to the last step, evaluating and saving on the way and at the end."""
        started = time.perf_counter()
        with Tracker(self.config, self.run_dir, self.resumed_step, enabled=self.world.is_main) as tracker:
            if self.resumed_step is None:
                tracker.log_topology(self.step, self.topology.unit_masks())
            progress = Progress(self.last_step, self.step, enabled=self.world.is_main)
            window = MetricsWindow(self.device)
            if tracker.ui_command:
                progress.write(f"watch the run with: {tracker.ui_command}")
            batches = self.train_data.batches(self.step, self.last_step)
            evaluation: dict[str, float] = {}
            while self.step < self.last_step:
                update = self._train_step(batches, window)
                metrics = update.metrics() if update else {}
                if update:
                    tracker.log_topology(update.step, update.unit_masks)
                progress.advance()
                evaluates, saves = self._is_due(self.config.train.eval_every_epochs), self._is_due(self._save_every)
                if not (metrics or evaluates or saves or self.step % self.config.train.log_every == 0):
                    continue
                metrics |= window.close(self.config.train.global_batch_size) | self._state_metrics()
                self.train_data.damage.check(window.damaged, window.samples)
                if evaluates:
                    evaluation = evaluate(self.backend, self.eval_data, self.eval_transform)
                    metrics |= evaluation
                if saves:
                    self.checkpoint.save()
                window.restart()
                tracker.log(self.step, metrics)
                progress.show(metrics)
            # Where a finished run was resumed, no step evaluated it.
            evaluation = evaluation or evaluate(self.backend, self.eval_data, self.eval_transform)
            progress.close()
            tracker.summarize(self._summary(time.perf_counter() - started, evaluation))
            progress.write(f"{self.run_dir}: {self.step} steps, test accuracy {100 * evaluation['eval_accuracy']:.2f}%")

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
            batch = next(batches)
            images, targets = self.train_transform(batch.images, batch.labels)
            loss, logits = self.loss(self.backend.forward(images), targets, images)
            self.backend.backward(loss)
            window.add(loss.detach(), logits.detach(), batch)
        window.step(self.backend.step())
        return self.topology.step()

    def _build_backend(self) -> tuple[Backend, float]:
        """The wrapped model, and the active share of its prunable weights."""
        config = self.config
        model, plan = build_sparse_vit(config.model, config.sparsity, config.seed)
        if config.distillation.teacher is not None:
            answer_twice(model)
        options = EngineOptions(
            device=self.device,
            units=blocks(model),
            micro_batch_size=config.micro_batch_size(self.world.size),
            accumulation_steps=config.train.accumulation_steps,
            bf16=config.train.precision == "bf16",
            clip_grad_norm=config.train.clip_grad_norm,
        )
        backend = build_backend(config.parallel, model, lambda module: build_optimizer(module, config.optimizer), options)
        return backend, plan_density(plan)

    def _load(self) -> int:
        """Loads the newest checkpoint; returns its step."""
        # Optimizers create their state at their first step, so take one that changes nothing.
        for group in self.backend.optimizer.param_groups:
            group["lr"] = 0.0
        model, size = self.config.model, self.config.micro_batch_size(self.world.size)
        images = torch.zeros(size, model.in_channels, model.image_size, model.image_size, device=self.device)
        for _ in range(self.config.train.accumulation_steps):
            self.backend.backward(self.backend.forward(images).float().sum() * 0.0)
        self.backend.step()
        return self.checkpoint.load()

    @property
    def _save_every(self) -> int | None:
        return self.config.train.checkpoint_every_epochs

    def _is_due(self, every_epochs: int | None) -> bool:
        """Whether something done every so many epochs, and at the end, is due after this step."""
        if self.step == self.last_step:
            return True
        return every_epochs is not None and self.train_data.steps.ends_epoch(self.step, every_epochs)

    def _state_metrics(self) -> dict[str, float]:
        return {
            "epoch": self.step / self.train_data.steps.per_epoch,
            "lr": self.backend.optimizer.param_groups[0]["lr"],
            "density": self.density,
            "drop_rate": self.topology.rate,
            "postponed_updates": self.topology.postponed,
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


def open_data(config: Config, world: World) -> tuple[TrainData, EvalData]:
    """This rank's share of the training and the evaluation samples.

    Raises:
        ConfigError: labels don't fit the model.
        DataError: the shards can't be read.
    """
    model, train = config.model, config.train
    train_data = TrainData(
        config.data,
        image_size=model.image_size,
        in_channels=model.in_channels,
        global_batch_size=train.global_batch_size,
        accumulation_steps=train.accumulation_steps,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
    )
    eval_data = EvalData(
        config.data,
        image_size=model.image_size,
        in_channels=model.in_channels,
        batch_size=train.eval_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    num_classes = max(train_data.num_classes, eval_data.num_classes)
    if num_classes > model.num_classes:
        largest, place = largest_label(load_indexes(config.data.train) + load_indexes(config.data.val))
        problem = f"is too few for labels 0 to {largest}, which is that of {place}"
        raise ConfigError("model.num_classes", model.num_classes, problem, "raise it, or correct the label")
    return train_data, eval_data
