"""What a config's model costs: multiply-accumulates of one image's forward, and parameters, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass

from timm.models import VisionTransformer

from svite_scale.config import Config
from svite_scale.models.sparse_vit import plan_sparse_vit
from svite_scale.sparsity.layer_plan import LayerPlan


@dataclass(frozen=True)
class LayerCost:
    """One layer's multiply-accumulates for one image.

    Attributes:
        name: module name.
        dense_macs: with all weights.
        sparse_macs: with the active weights only.
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
        layers: the layers that can be made sparse, those kept dense included.
        attention_macs: queries times keys, and attention times values, over all blocks.
        params_dense: parameters of the dense model.
        params_active: the same, counting active weights only; masks aren't parameters.
    """

    layers: tuple[LayerCost, ...]
    attention_macs: int
    params_dense: int
    params_active: int

    @property
    def dense_macs(self) -> int:
        return sum(layer.dense_macs for layer in self.layers) + self.attention_macs

    @property
    def sparse_macs(self) -> int:
        return sum(layer.sparse_macs for layer in self.layers) + self.attention_macs

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
    layers = tuple(_layer_cost(entry, _applications(model, entry.name)) for entry in plan)
    tokens = _num_tokens(model)
    attention = sum(2 * tokens**2 * block.attn.num_heads * block.attn.head_dim for block in model.blocks)
    active = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inactive = sum(entry.numel - entry.num_active for entry in plan)
    return ModelCost(layers, attention, active + inactive, active)


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
