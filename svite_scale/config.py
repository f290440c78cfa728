"""What a run is configured by: nested dataclasses, one per component, with the bounds of each field beside it.

A YAML file and ``dotted.key=value`` overrides become a :class:`Config` through :mod:`svite_scale.config_reader`, which checks
types, bounds and unknown keys from the annotations here. What no single field can tell is checked by :meth:`Config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from svite_scale.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """Closed bounds of a number; ``above`` is an open lower bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense timm VisionTransformer. A field that is null keeps what ``name`` says."""

    name: str = "deit_tiny_patch16_224"
    num_classes: Annotated[int, Bounds(low=1)] = 1000
    image_size: Annotated[int, Bounds(low=1)] = 224
    """Pixels, height and width alike."""
    in_channels: Literal[1, 3] = 3
    patch_size: Annotated[int | None, Bounds(low=1)] = None
    embed_dim: Annotated[int | None, Bounds(low=1)] = None
    depth: Annotated[int | None, Bounds(low=1)] = None
    num_heads: Annotated[int | None, Bounds(low=1)] = None
    drop_path: Annotated[float, Bounds(low=0.0, high=0.99)] = 0.0
    """Stochastic depth rate of the last block; earlier blocks ramp up to it."""
    activation_checkpointing: bool = False
    """Keep only block inputs for backward and compute the rest again."""


@dataclass(frozen=True, kw_only=True)
class StructuredConfig:
    """Whole attention heads and MLP neurons (the paper's section 3.2, S2ViTE; DESIGN section 4)."""

    heads: Annotated[float, Bounds(above=0.0, high=1.0)] = 1.0
    """Share of the heads of each block that is active, rounded down; 1.0 keeps all."""
    neurons: Annotated[float, Bounds(above=0.0, high=1.0)] = 1.0
    """The same of the hidden neurons of each block's MLP."""
    grow: Literal["candidate", "paper"] = "candidate"
    """Score of an absent head or neuron: ``candidate`` tries one with weights of its own; ``paper`` is the reference's."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """The learnable token selector (the paper's section 3.3, SViTE+; DESIGN section 5)."""

    keep: Annotated[float | None, Bounds(above=0.0)] = None
    """Tokens that go on, class, distillation and register tokens among them: up to 1 a share of those that reach the
    selector, rounded half up; above 1 a count. Null has no selector."""
    blocks: Annotated[tuple[int, ...], Bounds(low=0)] = (0,)
    """A selector stands before each of these blocks; 0 is after the embedding."""
    mode: Literal["gather", "mask"] = "gather"
    """``gather`` shortens the sequence; ``mask`` multiplies by zero instead, as the paper's code does, and saves nothing."""
    temperature: Annotated[float, Bounds(above=0.0)] = 10.0
    """Of the Gumbel softmax at the start of training."""
    final_temperature: Annotated[float, Bounds(above=0.0)] = 0.1
    """The same at its end; the temperature falls on a line by optimizer step."""


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """How many weights live, where, and how they move (the paper's section 3.2; DESIGN section 3)."""

    density: Annotated[float, Bounds(above=0.0, high=1.0)] = 1.0
    """Share of the prunable weights that is active; 1.0 trains the ordinary dense model."""
    distribution: Literal["uniform", "er", "erk"] = "erk"
    """How ``density`` is spread over the layers."""
    power_scale: Annotated[float, Bounds(above=0.0)] = 1.0
    """Exponent of ERK's ratio."""
    densities: Annotated[dict[str, float], Bounds(above=0.0, high=1.0)] = field(default_factory=dict)
    """Instead of ``density``: a layer's own, by pattern of its name (``blocks.*.attn.qkv``); the first that matches decides."""
    masks: str | None = None
    """Instead of ``density``: a safetensors file of one tensor of 0 and 1 per layer, named as in the dense state dict."""
    keep_dense: tuple[str, ...] = ()
    """Patterns of layers that aren't made sparse and don't count in ``density``."""
    structured: StructuredConfig = field(default_factory=StructuredConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    method: str = "svite"
    """What moves the weights: svite drops by magnitude and grows by gradient, set grows at random, mixed does both, static
    keeps the first mask, dense trains the ordinary dense model, whatever the density."""
    random_share: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.5
    """Share of the grown weights that ``method: mixed`` draws at random."""
    update_unit: Literal["steps", "epochs"] = "steps"
    """Unit of ``update_every`` and ``update_start``."""
    update_every: Annotated[float, Bounds(above=0.0)] = 20000.0
    """Optimizer steps, or epochs, between two topology updates."""
    update_start: Annotated[float, Bounds(low=0.0)] = 0.0
    """No topology update comes before this optimizer step, or epoch."""
    update_batch_size: Annotated[int | None, Bounds(low=1)] = None
    """Global batch that ``update_every`` and ``update_start`` are meant for, in steps: they are scaled by update_batch_size /
    global_batch_size, so that as many samples lie between two updates. Null takes them as they are."""
    stop_fraction: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.8
    """Topology updates stop at this share of all optimizer steps."""
    drop_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From ``drop_fraction`` at the start to ``final_drop_fraction`` at the stop; constant stays at the former."""
    drop_fraction: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.5
    """Share of the active weights dropped at an update, at the start."""
    final_drop_fraction: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.005
    grow_window: Annotated[int, Bounds(low=1)] = 1
    """Optimizer steps before an update, its own included, whose gradients are averaged to choose what grows."""
    grow_by: Literal["gradient", "magnitude"] = "gradient"
    """|mean of the window's gradients|, or the mean of their magnitudes."""
    grown_moments: Literal["mean", "zero"] = "mean"
    """Second moment of a grown weight: its layer's mean, or zero."""
    grown_warmup_steps: Annotated[int, Bounds(low=0)] = 0
    """Optimizer steps over which the learning rate of grown weights rises to the others'; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training-time augmentation. ``deit`` is the DeiT recipe through timm; ``affine`` is light and suits digits."""

    recipe: Literal["none", "affine", "deit"] = "none"
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's policy string, for ``recipe: deit``."""
    random_erasing: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.0
    mixup: Annotated[float, Bounds(low=0.0)] = 0.0
    """Alpha of mixup's beta distribution; 0 is off."""
    cutmix: Annotated[float, Bounds(low=0.0)] = 0.0
    label_smoothing: Annotated[float, Bounds(low=0.0, high=0.99)] = 0.0
    repeats: Annotated[int, Bounds(low=1)] = 1
    """Repeated augmentation: copies of a sample in an epoch, whose length stays the same."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tar shards with their index sidecars, as ``launch/make_shards.py`` writes them."""

    train: str = ""
    """Brace pattern, glob, or folder of the training shards."""
    val: str = ""
    """The same for the evaluation shards."""
    workers: Annotated[int, Bounds(low=0)] = 2
    """Loader processes per rank."""
    shuffle_shards: Annotated[int, Bounds(low=1)] = 64
    """Samples are shuffled within windows of this many (shuffled) shards."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, for pixels in 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    eval_crop: Annotated[float, Bounds(above=0.0, high=1.0)] = 0.875
    """Centre crop at evaluation, as a share of the resized image (224 of 256)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule: linear warm-up, then a cosine, by optimizer step."""

    name: Literal["adamw", "adam", "nadam", "radam"] = "adamw"
    lr: Annotated[float, Bounds(above=0.0)] = 5e-4
    lr_batch_size: Annotated[int | None, Bounds(low=1)] = None
    """Batch size that ``lr`` is meant for: the rate used is lr * global_batch_size / lr_batch_size. Null uses lr as it is."""
    weight_decay: Annotated[float, Bounds(low=0.0)] = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Bounds(above=0.0)] = 1e-8
    warmup_epochs: Annotated[float, Bounds(low=0.0)] = 0.0
    warmup_lr: Annotated[float, Bounds(low=0.0)] = 1e-6
    min_lr: Annotated[float, Bounds(low=0.0)] = 1e-5


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and what is written when."""

    epochs: Annotated[int, Bounds(low=1)] = 300
    max_steps: Annotated[int | None, Bounds(low=1)] = None
    """Stop after this many optimizer steps; schedules still span ``epochs``. Null runs all epochs."""
    global_batch_size: Annotated[int, Bounds(low=1)] = 1024
    """Samples in one optimizer step, over all ranks and accumulation steps."""
    accumulation_steps: Annotated[int, Bounds(low=1)] = 1
    """Micro-batches whose gradients one optimizer step averages."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16; the optimizer's master values stay fp32."""
    clip_grad_norm: Annotated[float | None, Bounds(above=0.0)] = None
    """Largest L2 norm of the whole gradient; null is off, on every backend."""
    log_every: Annotated[int, Bounds(low=1)] = 50
    """Optimizer steps between two lines of metrics."""
    eval_every_epochs: Annotated[int, Bounds(low=1)] = 1
    eval_batch_size: Annotated[int, Bounds(low=1)] = 64
    """Samples per rank."""
    checkpoint_every_epochs: Annotated[int | None, Bounds(low=1)] = None
    """Null saves at the end only."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The engine that shards the training state."""

    backend: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    zero_stage: Literal[1, 2, 3] = 3
    """For ``backend: deepspeed``."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow, beside the run directory's own ``metrics.jsonl``."""

    mlflow: bool = True
    uri: str | None = None
    """Null is a SQLite file in the run directory's parent."""
    experiment: str = "svite_scale"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str
    """Where the run's files go; must not hold another run unless it is resumed."""
    seed: Annotated[int, Bounds(low=0, high=2**31 - 1)] = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def micro_batch_size(self, world_size: int) -> int:
        """Samples that one rank computes at a time.

        Raises:
            ConfigError: the global batch doesn't divide.
        """
        parts = world_size * self.train.accumulation_steps
        size, rest = divmod(self.train.global_batch_size, parts)
        if rest or not size:
            raise ConfigError(
                "train.global_batch_size",
                self.train.global_batch_size,
                f"is not divisible by world size ({world_size}) x train.accumulation_steps ({self.train.accumulation_steps})",
                f"use a multiple of {parts}",
            )
        return size
