"""What a config's model costs: multiply-accumulates of one image's forward, and parameters, dense and sparse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.models import VisionTransformer

from svite_scale.config import Config, ModelConfig
from svite_scale.models.sparse_vit import plan_sparse_vit
from svite_scale.models.vit import build_vit
from svite_scale.sparsity.layer_plan import LayerPlan
from svite_scale.sparsity.unit_layer import UnitLayer


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one layer, or of one attention's products, for one image.

    Attributes:
        name: of the layer's module, or of the attention's.
        dense_macs: with all weights, heads and neurons.
        sparse_macs: with the active ones only.
    """

    name: str
    dense_macs: int
    sparse_macs: int


@dataclass(frozen=True)
class ModelCost:
    """Cost of one image's forward.

    Multiply-accumulates of the matrix products: linear and patch layers, and attention's two products, which sparse weights
    don't shorten. Norms, softmax and activations are left out, as in the paper's figures.

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

        An arithmetic count: unstructured zeros make a dense matrix product no faster, absent heads and neurons do.
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
    tokens = _num_tokens(dense)
    layers = [_layer_cost(entry, _applications(dense, entry.name)) for entry in plan]
    active = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers += _attention_costs(dense, model, tokens)
    return ModelCost(tuple(layers), sum(parameter.numel() for parameter in dense.parameters()), active)


def _attention_costs(dense: VisionTransformer, model: VisionTransformer, tokens: int) -> Iterator[LayerCost]:
    """Queries times keys, and attention times values, of each block."""
    for index, (whole, block) in enumerate(zip(dense.blocks, model.blocks, strict=True)):
        head_macs, attn = 2 * tokens**2 * whole.attn.head_dim, block.attn
        active = attn.num_active if isinstance(attn, UnitLayer) else attn.num_heads
        yield LayerCost(f"blocks.{index}.attn", whole.attn.num_heads * head_macs, active * head_macs)


def _num_tokens(model: VisionTransformer) -> int:
    """Tokens in the blocks: patches and prefix (class, distillation, registers)."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def _applications(model: VisionTransformer, name: str) -> int:
    """How many times a forward of one image applies the layer's weight."""
    if name.startswith("patch_embed."):
        return model.patch_embed.num_patches
    return _num_tokens(model) if name.startswith("blocks.") else 1


def _layer_cost(entry: LayerPlan, applications: int) -> LayerCost:
    return LayerCost(entry.name, entry.numel * applications, entry.num_active * applications)
