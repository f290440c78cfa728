"""Shapes of the DeiT models, written out by hand."""

from __future__ import annotations

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
UNPRUNED = {"tiny": 69_544, "small": 138_088, "base": 275_176}
"""Parameters that stay dense: biases, norms, positions and class token."""


def deit_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the prunable layers of a DeiT at 224 px, patch 16, 1000 classes."""
    width = WIDTHS[size]
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (width, 3, 16, 16)}
    for index in range(12):
        block = f"blocks.{index}"
        shapes |= {
            f"{block}.attn.qkv": (3 * width, width),
            f"{block}.attn.proj": (width, width),
            f"{block}.mlp.fc1": (4 * width, width),
            f"{block}.mlp.fc2": (width, 4 * width),
        }
    return shapes | {"head": (1000, width)}
