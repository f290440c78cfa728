"""A config's model, made sparse."""

from __future__ import annotations

import torch
from torch import nn

from svite_scale.config.schema import ModelConfig, SparsityConfig
from svite_scale.errors import ConfigError, SparsifyError
from svite_scale.models.structure import pack_units, patterns_of_the_rest, refuse_packed_twice
from svite_scale.models.token_selector import insert_token_selectors
from svite_scale.models.vit import build_vit
from svite_scale.sparsity.allocation.layer_plan import LayerPlan
from svite_scale.sparsity.sparsify import prunable_layers, sparsify


def build_sparse_vit(model: ModelConfig, sparsity: SparsityConfig, seed: int) -> tuple[nn.Module, list[LayerPlan]]:
    """The model before any engine wraps it, and what is sparse in it. The same on every rank.

    Weights are drawn from torch's global generator, which this seeds; masks from (seed, layer name), or from a file.

    Raises:
        ConfigError: the model can't be built, or what ``sparsity`` says doesn't fit its layers.
    """
    torch.manual_seed(seed)
    built = build_vit(model)
    plan = sparsify(built, 1.0) if sparsity.method == "dense" else _sparsified(built, sparsity, seed)
    if sparsity.tokens.keep is not None:
        # Last, so that all other weights are drawn as without it.
        insert_token_selectors(built, sparsity.tokens)
    return built, plan


def plan_sparse_vit(model: ModelConfig, sparsity: SparsityConfig) -> tuple[nn.Module, list[LayerPlan]]:
    """The same on the meta device: shapes and counts only, at no cost in memory."""
    with torch.device("meta"):
        return build_sparse_vit(model, sparsity, seed=0)


def _sparsified(model: nn.Module, sparsity: SparsityConfig, seed: int) -> list[LayerPlan]:
    """Packs the model's layers in place, by heads and neurons, and the others by density, densities or masks."""
    order = list(prunable_layers(model))
    in_units = pack_units(model, sparsity.structured, seed)
    names = {entry.name for entry in in_units}
    refuse_packed_twice(sparsity, names)
    is_spread = not sparsity.densities and sparsity.masks is None
    try:
        weights = sparsify(
            model,
            sparsity.density if is_spread else None,
            distribution=sparsity.distribution,
            power_scale=sparsity.power_scale,
            densities=sparsity.densities or None,
            masks=sparsity.masks,
            keep_dense=patterns_of_the_rest(sparsity.keep_dense, names, order),
            seed=seed,
        )
    except SparsifyError as error:
        raise ConfigError(f"sparsity.{error.field}", error.value, error.problem, error.remedy) from error
    return sorted([*in_units, *weights], key=lambda entry: order.index(entry.name))
