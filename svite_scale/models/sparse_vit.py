"""A config's model, made sparse."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from timm.models import VisionTransformer

from svite_scale.config import ModelConfig, SparsityConfig
from svite_scale.errors import ConfigError, SparsifyError
from svite_scale.models.structure import pack_units
from svite_scale.models.vit import build_vit
from svite_scale.sparsity.layer_plan import LayerPlan
from svite_scale.sparsity.sparsify import prunable_layers, sparsify


def build_sparse_vit(model: ModelConfig, sparsity: SparsityConfig, seed: int) -> tuple[VisionTransformer, list[LayerPlan]]:
    """The model before any engine wraps it, and what is sparse in it. The same on every rank.

    Weights are drawn from torch's global generator, which this seeds; masks from (seed, layer name), or from a file.

    Raises:
        ConfigError: the model can't be built, or what ``sparsity`` says doesn't fit its layers.
    """
    torch.manual_seed(seed)
    vit = build_vit(model)
    if sparsity.method == "dense":
        return vit, sparsify(vit, 1.0)
    order = list(prunable_layers(vit))
    in_units = pack_units(vit, sparsity.structured, seed)
    weights = _sparsify_rest(vit, sparsity, seed, {entry.name for entry in in_units})
    return vit, sorted([*in_units, *weights], key=lambda entry: order.index(entry.name))


def _sparsify_rest(vit: VisionTransformer, sparsity: SparsityConfig, seed: int, in_units: set[str]) -> list[LayerPlan]:
    """Packs the weights that aren't packed by heads or neurons."""
    is_spread = not sparsity.densities and sparsity.masks is None
    if in_units and not (is_spread and sparsity.density == 1.0):
        refuse_packed_twice(sparsity, in_units)
    try:
        return sparsify(
            vit,
            sparsity.density if is_spread else None,
            distribution=sparsity.distribution,
            power_scale=sparsity.power_scale,
            densities=sparsity.densities or None,
            masks=sparsity.masks,
            keep_dense=[pattern for pattern in sparsity.keep_dense if not _matches_only(vit, pattern, in_units)],
            seed=seed,
        )
    except SparsifyError as error:
        raise ConfigError(f"sparsity.{error.field}", error.value, error.problem, error.remedy) from error


def refuse_packed_twice(sparsity: SparsityConfig, in_units: set[str]) -> None:
    """Raises:
    ConfigError: a weight is packed by heads or neurons, and isn't kept from being packed by elements too.
    """
    kept = {name for name in in_units for pattern in sparsity.keep_dense if fnmatchcase(name, pattern)}
    for name in sorted(in_units - kept):
        field = "heads" if ".attn." in name else "neurons"
        raise ConfigError(
            f"sparsity.structured.{field}",
            getattr(sparsity.structured, field),
            f"packs {name} by {field}, whose weights density, densities or masks would pack too",
            f'list "{name.rpartition(".")[0].replace(name.split(".")[1], "*", 1)}.*" in sparsity.keep_dense',
        )


def _matches_only(vit: VisionTransformer, pattern: str, in_units: set[str]) -> bool:
    """Whether a pattern is about layers that are packed by heads or neurons, and no others."""
    rest = prunable_layers(vit)
    return any(fnmatchcase(name, pattern) for name in in_units) and not any(fnmatchcase(name, pattern) for name in rest)


def plan_sparse_vit(model: ModelConfig, sparsity: SparsityConfig) -> tuple[VisionTransformer, list[LayerPlan]]:
    """The same on the meta device: shapes and counts only, at no cost in memory."""
    with torch.device("meta"):
        return build_sparse_vit(model, sparsity, seed=0)
