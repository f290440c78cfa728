"""A config's model, made sparse."""

from __future__ import annotations

import torch
from timm.models import VisionTransformer

from svite_scale.config import ModelConfig, SparsityConfig
from svite_scale.models.vit import build_vit
from svite_scale.sparsity.sparsify import LayerPlan, sparsify


def build_sparse_vit(model: ModelConfig, sparsity: SparsityConfig, seed: int) -> tuple[VisionTransformer, list[LayerPlan]]:
    """The model before any engine wraps it, and what is sparse in it. The same on every rank.

    Weights are drawn from torch's global generator, which this seeds; masks from (seed, layer name).
    """
    torch.manual_seed(seed)
    vit = build_vit(model)
    return vit, sparsify(vit, sparsity.density, distribution=sparsity.distribution, seed=seed)


def plan_sparse_vit(model: ModelConfig, sparsity: SparsityConfig) -> tuple[VisionTransformer, list[LayerPlan]]:
    """The same on the meta device: shapes and counts only, at no cost in memory."""
    with torch.device("meta"):
        return build_sparse_vit(model, sparsity, seed=0)
