"""What a config's model costs: multiply-accumulates of one image's forward, and parameters, dense and sparse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer

from svite_scale.config import Config, ModelConfig
from svite_scale.models.sparse_vit import plan_sparse_vit
from svite_scale.models.token_selector import TokenSelector
from svite_scale.models.vit import blocks, build_vit
from svite_scale.sparsity.layer_plan import LayerPlan
from svite_scale.sparsity.unit_layer import UnitLayer


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one layer, or of one attention's products, for one image.

    Attributes:
        name: of the layer's module, or of the attention's.
        dense_macs: with all weights, heads and neurons, over all tokens.
        sparse_macs: with the active ones only, over the tokens that reach the layer.
    """

    name: str
    dense_macs: int
    sparse_macs: int


@dataclass(frozen=True)
class ModelCost:
    """Cost of one image's forward.

    Multiply-accumulates of the matrix products: linear and patch layers, and attention's two products, which sparse weights
    don't shorten. Norms, softmax, activations and the scores of token selectors are left out, as in the paper's figures.

    Attributes:
        layers: the layers that can be made sparse, those kept dense included, and each block's attention.
        params_dense: parameters of the dense model.
        params_active: the same, counting active weights only; masks aren't parameters.
    """

    layers: tuple[LayerCost, ...]
    params_dense: int
    params_active: int

    @property
    def dense_macs(self) -> int:
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def sparse_macs(self) -> int:
        return sum(layer.sparse_macs for layer in self.layers)

    @property
    def saving(self) -> float:
        """Share of the dense multiply-accumulates that the sparse model does without, 0 to 1.

        An arithmetic count: unstructured zeros make a dense matrix product no faster, absent heads, neurons and tokens do.
        """
        return 1.0 - self.sparse_macs / self.dense_macs


def count(config: Config) -> ModelCost:
    """Cost of the config's model, from shapes alone.

    Raises:
        ConfigError: the model can't be built.
    """
    model, plan = plan_sparse_vit(config.model, config.sparsity)
    return model_cost(config.model, model, plan)


def model_cost(config: ModelConfig, model: VisionTransformer, plan: list[LayerPlan]) -> ModelCost:
    """Cost of a config's model that was made sparse by a plan."""
    with torch.device("meta"):
        dense = build_vit(config)
    all_tokens, tokens = block_tokens(dense), block_tokens(model)
    layers = [
        LayerCost(
            entry.name,
            entry.numel * _applications(dense, entry.name, all_tokens),
            entry.num_active * _applications(dense, entry.name, tokens),
        )
        for entry in plan
    ]
    layers += _attention_costs(dense, model, all_tokens, tokens)
    active = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ModelCost(tuple(layers), sum(parameter.numel() for parameter in dense.parameters()), active)


def block_tokens(model: VisionTransformer) -> list[int]:
    """Tokens that reach each block: patches and prefix (class, distillation, registers), less those that selectors drop."""
    found, tokens = [], model.patch_embed.num_patches + model.num_prefix_tokens
    for item in model.blocks:
        if not isinstance(item, TokenSelector):
            found.append(tokens)
        elif item.mode == "gather":
            tokens = item.num_tokens
    return found


def _attention_costs(
    dense: VisionTransformer, model: VisionTransformer, all_tokens: list[int], tokens: list[int]
) -> Iterator[LayerCost]:
    """Queries times keys, and attention times values, of each block."""
    pairs: Iterator[tuple[Any, Any]] = zip(blocks(dense), blocks(model), strict=True)
    for index, (whole, block) in enumerate(pairs):
        # Of a head's values; differential attention splits queries and keys further, into pairs of half that width.
        width, attn = whole.attn.proj.in_features // whole.attn.num_heads, block.attn
        active = attn.num_active if isinstance(attn, UnitLayer) else attn.num_heads
        yield LayerCost(
            f"blocks.{index}.attn",
            2 * all_tokens[index] ** 2 * width * whole.attn.num_heads,
            2 * tokens[index] ** 2 * width * active,
        )


def _applications(model: VisionTransformer, name: str, tokens: list[int]) -> int:
    """How many times a forward of one image applies the layer's weight."""
    if name.startswith("patch_embed."):
        return model.patch_embed.num_patches
    return tokens[int(name.split(".")[1])] if name.startswith("blocks.") else 1
