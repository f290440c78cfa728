"""The dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from svite_scale.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense timm model. A field that is null keeps what ``name`` says, and one that the model doesn't take is refused."""

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
