"""What is sparse, how much, and how it moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from svite_scale.config.bounds import Bounds


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
    update_every: Annotated[float, Bounds(above=0.0, high=1e12)] = 20000.0
    """Optimizer steps, or epochs, between two topology updates."""
    update_start: Annotated[float, Bounds(low=0.0, high=1e12)] = 0.0
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
