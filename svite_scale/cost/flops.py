"""What a config's model costs: multiply-accumulates of one image's forward, and parameters, dense and sparse."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

from torch import nn

from svite_scale.models.dense import check_model
from svite_scale.models.matrix_products import matrix_products
from svite_scale.models.options import ModelConfig
from svite_scale.models.packed_attention import PackedAttention
from svite_scale.models.token_selector import TokenSelector, token_selectors
from svite_scale.sparsity.allocation.layer_plan import LayerPlan


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one layer, or of the products in a module that no layer's weight takes part in, for one image.

    Attributes:
        name: of the layer's module, or of the other one, an attention say.
        dense_macs: with all weights, heads and neurons, over all tokens.
        sparse_macs: with the active ones only, over the tokens that reach the layer.
    """

    name: str
    dense_macs: int
    sparse_macs: int


@dataclass(frozen=True)
class ModelCost:
    """Cost of one image's forward.

    Multiply-accumulates of the matrix products and convolutions: those of layers that can be made sparse, and others, such as
    attention's two, which sparse weights don't shorten. Norms, softmax, activations, pooling and the scores of token selectors
    are left out, as in the paper's figures.

    Attributes:
        layers: the layers that can be made sparse, those kept dense included, and the modules with other products.
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


def model_cost(config: ModelConfig, model: nn.Module, layers: list[LayerPlan]) -> ModelCost:
    """Returns the cost of a config's model that was made sparse, from shapes alone."""
    dense = check_model(config)
    whole = passing = dense.products
    if token_selectors(model):
        passing = matrix_products(_with_selectors_of(model, dense.model), config.image_size, config.in_channels)
    costs = [
        LayerCost(entry.name, entry.numel * whole.applications[entry.name], entry.num_active * passing.applications[entry.name])
        for entry in layers
    ]
    for name, macs in whole.others.items():
        attention = model.get_submodule(name)
        absent = 1 - attention.num_active / attention.shape.numel() if isinstance(attention, PackedAttention) else 0
        costs.append(LayerCost(name, macs, passing.others[name] - round(absent * passing.others[name])))
    active = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    params_dense = sum(parameter.numel() for parameter in dense.model.parameters())
    return ModelCost(tuple(costs), params_dense, active)


def _with_selectors_of(model: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of the dense model with copies of a sparse one's token selectors, on the meta device."""
    copy = deepcopy(dense)
    own = dict(cast(nn.Module, copy.blocks).named_children())
    copy.blocks = nn.Sequential(
        OrderedDict(
            (name, deepcopy(item).to("meta") if isinstance(item, TokenSelector) else own[name])
            for name, item in cast(nn.Module, model.blocks).named_children()
        )
    )
    return copy
