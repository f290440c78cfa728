"""What a config's model costs: multiply-accumulates of one image's forward, and parameters, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.models import VisionTransformer

from svite_scale.config import Config
from svite_scale.models.sparse_vit import plan_sparse_vit
from svite_scale.models.token_selector import TokenSelector, token_selectors
from svite_scale.models.vit import blocks
from svite_scale.sparsity.layer_plan import LayerPlan


@dataclass(frozen=True)
class LayerCost:
    """One layer's multiply-accumulates for one image.

    Attributes:
        name: module name.
        dense_macs: with all weights, over all tokens.
        sparse_macs: with the active weights only, over the tokens that reach the layer.
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
        layers: the layers that can be made sparse, those kept dense included.
        dense_attention_macs: queries times keys, and attention times values, over all blocks and all tokens.
        sparse_attention_macs: the same over the tokens that reach each block.
        params_dense: parameters of the dense model, without token selectors.
        params_active: the same, counting active weights only; masks aren't parameters.
    """

    layers: tuple[LayerCost, ...]
    dense_attention_macs: int
    sparse_attention_macs: int
    params_dense: int
    params_active: int

    @property
    def dense_macs(self) -> int:
        return sum(layer.dense_macs for layer in self.layers) + self.dense_attention_macs

    @property
    def sparse_macs(self) -> int:
        return sum(layer.sparse_macs for layer in self.layers) + self.sparse_attention_macs

    @property
    def saving(self) -> float:
        """Share of the dense multiply-accumulates that the sparse model does without, 0 to 1.

        An arithmetic count: unstructured zeros make a dense matrix product no faster.
        """
        return 1.0 - self.sparse_macs / self.dense_macs


def count(config: Config) -> ModelCost:
    """Cost of the config's model, from shapes alone.

    Raises:
        ConfigError: the model can't be built.
    """
    model, plan = plan_sparse_vit(config.model, config.sparsity)
    return model_cost(model, plan)


def model_cost(model: VisionTransformer, plan: list[LayerPlan]) -> ModelCost:
    """Cost of a sparsified model with its plan."""
    all_tokens = [model.patch_embed.num_patches + model.num_prefix_tokens] * len(blocks(model))
    tokens = _block_tokens(model)
    layers = tuple(
        LayerCost(
            entry.name,
            entry.numel * _applications(model, entry.name, all_tokens),
            entry.num_active * _applications(model, entry.name, tokens),
        )
        for entry in plan
    )
    active = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inactive = sum(entry.numel - entry.num_active for entry in plan)
    selecting = sum(selector.weight.numel() for selector in token_selectors(model))
    return ModelCost(
        layers, _attention_macs(model, all_tokens), _attention_macs(model, tokens), active + inactive - selecting, active
    )


def _block_tokens(model: VisionTransformer) -> list[int]:
    """Tokens that reach each block: patches and prefix (class, distillation, registers), less those that selectors drop."""
    found, tokens = [], model.patch_embed.num_patches + model.num_prefix_tokens
    for item in model.blocks:
        if not isinstance(item, TokenSelector):
            found.append(tokens)
        elif item.mode == "gather":
            tokens = item.num_tokens
    return found


def _attention_macs(model: VisionTransformer, block_tokens: list[int]) -> int:
    """Of attention's two products, over all blocks."""
    attentions: list[Any] = [block.attn for block in blocks(model)]
    widths = [attention.num_heads * attention.head_dim for attention in attentions]
    return sum(2 * tokens**2 * width for tokens, width in zip(block_tokens, widths, strict=True))


def _applications(model: VisionTransformer, name: str, block_tokens: list[int]) -> int:
    """How many times a forward of one image applies the layer's weight."""
    if name.startswith("patch_embed."):
        return model.patch_embed.num_patches
    return block_tokens[int(name.split(".")[1])] if name.startswith("blocks.") else 1
