"""A model made sparse, for real or on the meta device."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from svite_scale.models.dense import build_dense, check_model
from svite_scale.models.options import ModelConfig, SparseModelOptions, StructuredConfig, TokensConfig
from svite_scale.models.structure import pack_units
from svite_scale.models.token_selector import insert_token_selectors
from svite_scale.options import in_section, options_of
from svite_scale.sparsity.allocation.layer_plan import LayerPlan
from svite_scale.sparsity.packing import pack_weights, prunable_layers, sparsify


class SparseModel(NamedTuple):
    """A model, and what is sparse in it."""

    model: nn.Module
    layers: list[LayerPlan]


def build_sparse(config: ModelConfig, sparsity: SparseModelOptions, seed: int) -> SparseModel:
    """Returns the model before any engine wraps it. The same on every rank.

    Weights are drawn from torch's global generator, which this seeds; masks from (seed, layer name), or from a file.

    Raises:
        ConfigError: the model can't be built, or what ``sparsity`` says doesn't fit its layers.
    """
    torch.manual_seed(seed)
    model = build_dense(config)
    return SparseModel(model, _make_sparse(model, sparsity, seed))


def plan_sparse(config: ModelConfig, sparsity: SparseModelOptions) -> SparseModel:
    """Returns what :func:`build_sparse` would build, on the meta device: shapes and counts only, at no cost in memory.

    Raises:
        ConfigError: see :func:`build_sparse`.
    """
    _, checked = check_model(config)
    model = deepcopy(checked)
    with torch.device("meta"):
        return SparseModel(model, _make_sparse(model, sparsity, seed=0))


def _make_sparse(model: nn.Module, sparsity: SparseModelOptions, seed: int) -> list[LayerPlan]:
    """Packs the model's layers in place, first by heads and neurons, and the others by weights; then inserts selectors."""
    if sparsity.method == "dense":
        layers = sparsify(model, 1.0)
    else:
        order = list(prunable_layers(model))
        with in_section("sparsity.structured"):
            in_units = pack_units(model, **options_of(StructuredConfig, sparsity.structured), seed=seed)
        with in_section("sparsity"):
            rest = pack_weights(model, sparsity, seed, packed_otherwise={entry.name for entry in in_units})
        layers = sorted([*in_units, *rest], key=lambda entry: order.index(entry.name))
    if sparsity.tokens.keep is not None:
        # Last, so that all other weights are drawn as without selectors.
        with in_section("sparsity.tokens"):
            insert_token_selectors(model, **options_of(TokensConfig, sparsity.tokens))
    return layers
