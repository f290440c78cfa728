"""The teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from svite_scale.config.bounds import Bounds


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learning from another model's answers too (DeiT, arXiv:2012.12877, section 4)."""

    teacher: str | None = None
    """timm's name of the teacher; null is off."""
    checkpoint: str | None = None
    """Its weights: a local ``.safetensors``, or a ``.pth`` of a state dict."""
    kind: Literal["soft", "hard"] = "hard"
    """``soft`` compares with all that the teacher says, ``hard`` with its first guess."""
    alpha: Annotated[float, Bounds(above=0.0, high=1.0)] = 0.5
    """The teacher's share of the loss; the labels have the rest."""
    temperature: Annotated[float, Bounds(above=0.0)] = 3.0
    """Divides both models' logits, for ``kind: soft``."""
    mean: tuple[float, ...] | None = None
    """Per channel, for pixels in 0..1, as the teacher was trained; null is ``data.mean``."""
    std: tuple[float, ...] | None = None
    """The same; null is ``data.std``."""
