"""Tiny sparse models of every kind, with random weights everywhere, and images for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svite_scale.config.schema import SparsityConfig
from svite_scale.models.options import ModelConfig, StructuredConfig, TokensConfig
from svite_scale.models.sparse import build_sparse

SIZES = {"image_size": 12, "patch_size": 3, "in_channels": 1, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
VIT = ModelConfig(name="vit_tiny_patch16_224", **SIZES)
UNITS = {"heads": 0.5, "neurons": 0.6}

MODELS = {
    "weights": (VIT, SparsityConfig(density=0.4)),
    "blocks": (VIT, SparsityConfig(density=0.4, block=(8, 4))),
    "units": (VIT, SparsityConfig(structured=StructuredConfig(**UNITS))),
    "units of the paper, densities beside them": (
        VIT,
        SparsityConfig(density=0.5, structured=StructuredConfig(grow="paper", neurons=1.0, heads=0.5)),
    ),
    "units and tokens": (
        ModelConfig(name="deit_tiny_distilled_patch16_224", **SIZES),
        SparsityConfig(structured=StructuredConfig(**UNITS), tokens=TokensConfig(keep=0.6, blocks=(0, 1))),
    ),
    "masked tokens": (VIT, SparsityConfig(density=0.4, tokens=TokensConfig(keep=0.5, mode="mask"))),
    "not a ViT": (
        ModelConfig(name="convnext_atto", image_size=32, in_channels=1, num_classes=5),
        SparsityConfig(density=0.4),
    ),
}
"""By what is sparse, a model's config."""


def sparse_model(name: str) -> tuple[nn.Module, ModelConfig]:
    """Returns a model of ``MODELS`` in evaluation mode, and its config."""
    config, sparsity = MODELS[name]
    model = build_sparse(config, sparsity, seed=3).model.eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():  # biases too, which timm starts at 0
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, config


def images_for(config: ModelConfig, count: int = 3) -> Tensor:
    shape = (count, config.in_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits
