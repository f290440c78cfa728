"""A model made sparse, for real or on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from svite_scale.errors import ConfigError
from svite_scale.models.dense import build_dense, check_model
from svite_scale.models.options import ModelConfig, SparseModelOptions, TokensConfig
from svite_scale.models.structure import pack_units
from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.models.weights import FittedWeights, fit, open_weights
from svite_scale.options import in_section, options_of
from svite_scale.sparsity.allocation.first_masks import FirstMasks, NonzeroWeights, SavedCounts
from svite_scale.sparsity.allocation.layer_plan import LayerPlan
from svite_scale.sparsity.options import FROM_WEIGHTS
from svite_scale.sparsity.packing import pack_weights, prunable_layers, sparsify


class SparseModel(NamedTuple):
    """A model, and what is sparse in it."""

    model: nn.Module
    layers: list[LayerPlan]


def build_sparse(
    config: ModelConfig, sparsity: SparseModelOptions, seed: int, saved: Mapping[str, int] | None = None
) -> SparseModel:
    """Returns the model before any engine wraps it. The same on every rank.

    Weights come from the file that the config names, or are drawn from torch's global generator, which this seeds. Masks come
    from (seed, layer name), from the weights, or from a file.

    Args:
        config: of the dense model.
        sparsity: says what is sparse in it.
        seed: of the run.
        saved: active weights of a checkpoint's packed layers, by name. The checkpoint is to replace all weights and masks, so
            no file of these is read. None for a new run.

    Raises:
        ConfigError: the model can't be built, or what ``sparsity`` says doesn't fit its layers.
    """
    torch.manual_seed(seed)
    model = build_dense(config)
    _insert_selectors(model, sparsity)
    weights = _fit_weights(model, config, sparsity, saved)
    if weights is not None:
        with in_section("model"):
            weights.load(model)
    return SparseModel(model, _make_sparse(model, sparsity, seed, weights, saved))


def plan_sparse(config: ModelConfig, sparsity: SparseModelOptions, saved: Mapping[str, int] | None = None) -> SparseModel:
    """Returns what :func:`build_sparse` would build, on the meta device: shapes and counts only, at no cost in memory.

    Logs what has to be changed so that the file of weights fits, one line each.

    Raises:
        ConfigError: see :func:`build_sparse`.
    """
    _, checked = check_model(config)
    model = deepcopy(checked)
    with torch.device("meta"):
        _insert_selectors(model, sparsity)
        weights = _fit_weights(model, config, sparsity, saved)
        if weights is not None:
            weights.log_changes()
        return SparseModel(model, _make_sparse(model, sparsity, 0, weights, saved))


def _insert_selectors(model: nn.Module, sparsity: SparseModelOptions) -> None:
    if sparsity.tokens.has_selectors:
        # After all other weights are drawn, which are therefore the same as without selectors.
        with in_section("sparsity.tokens"):
            insert_token_selectors(model, **options_of(TokensConfig, sparsity.tokens))


def _fit_weights(
    model: nn.Module, config: ModelConfig, sparsity: SparseModelOptions, saved: Mapping[str, int] | None
) -> FittedWeights | None:
    """Returns the weights that the model starts from; None if they are drawn, or a checkpoint replaces them."""
    if saved is not None:
        return None
    if config.weights is None:
        if sparsity.masks == FROM_WEIGHTS:
            problem = "takes the zeros of model.weights, which is null"
            raise ConfigError("sparsity.masks", FROM_WEIGHTS, problem, "set model.weights to the weights of a pruned model")
        return None
    with in_section("model"), torch.device("cpu"):
        return fit(model, open_weights(config.weights))


def _make_sparse(
    model: nn.Module,
    sparsity: SparseModelOptions,
    seed: int,
    weights: FittedWeights | None,
    saved: Mapping[str, int] | None,
) -> list[LayerPlan]:
    """Packs the model's layers in place, first by heads and neurons, and the others by weights."""
    if sparsity.method == "dense":
        return sparsify(model, 1.0)
    masks: FirstMasks | None = None
    if saved is not None:
        masks = SavedCounts(saved)
    elif weights is not None and sparsity.masks == FROM_WEIGHTS:
        masks = NonzeroWeights(weights.active)
    order, by_magnitude = list(prunable_layers(model)), weights is not None
    units = sparsity.structured
    with in_section("sparsity.structured"):
        in_units = pack_units(
            model,
            heads=units.heads,
            neurons=units.neurons,
            grow=units.grow,
            init=sparsity.init,
            seed=seed,
            by_magnitude=by_magnitude,
        )
    with in_section("sparsity"):
        packed_otherwise = {entry.name for entry in in_units}
        rest = pack_weights(model, sparsity, seed, packed_otherwise, masks=masks, by_magnitude=by_magnitude)
    return sorted([*in_units, *rest], key=lambda entry: order.index(entry.name))
