"""What a model costs: multiply-accumulates of one image's forward, and parameters, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from svite_scale.errors import OptionError
from svite_scale.models.matrix_products import matrix_products
from svite_scale.models.token_insertion import remove_token_selectors
from svite_scale.models.token_selector import TokenSelector, token_selectors
from svite_scale.sparsity.dense import copied, to_dense
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.layers.plain_layer import refuse_wrapped
from svite_scale.sparsity.module_names import unwrapped
from svite_scale.sparsity.packing import prunable_layers


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one layer, or of the products in a module that no layer's weight takes part in, for one image.

    Attributes:
        name: of the layer's module, or of the other one, an attention say.
        dense_macs: with all weights, heads and neurons, over all tokens.
        sparse_macs: with the active ones only, over the tokens that reach the layer.
        multiplied_macs: those that the products really take, over the tokens that reach the layer. Products multiply inactive
            single weights as zeros. They leave out absent heads and neurons, and inactive blocks of a size that the device has
            products for.
    """

    name: str
    dense_macs: int
    sparse_macs: int
    multiplied_macs: int


@dataclass(frozen=True)
class ModelCost:
    """Cost of one image's forward.

    Multiply-accumulates of the matrix products and convolutions: those of layers that can be made sparse, and others, such as
    attention's two, which sparse weights don't shorten. The products of token selectors count too, which the dense model
    hasn't. Norms, softmax, activations and pooling are left out, as in the paper's figures.

    Attributes:
        layers: the layers that can be made sparse, those kept dense included, and the modules with other products.
        params_dense: parameters of the dense model.
        params_active: the same, counting active weights only; masks aren't parameters.
        device_type: ``cpu`` or ``cuda``, where ``multiplied_macs`` holds.
    """

    layers: tuple[LayerCost, ...]
    params_dense: int
    params_active: int
    device_type: str

    @property
    def dense_macs(self) -> int:
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def sparse_macs(self) -> int:
        return sum(layer.sparse_macs for layer in self.layers)

    @property
    def multiplied_macs(self) -> int:
        return sum(layer.multiplied_macs for layer in self.layers)

    @property
    def saving(self) -> float:
        """Fraction of the dense multiply-accumulates that the sparse model does without, 0 to 1.

        This is arithmetic. The time of a step follows ``multiplied_macs``.
        """
        return 1.0 - self.sparse_macs / self.dense_macs


def count_flops(
    model: nn.Module, image_size: int, *, device: torch.device | str | None = None, training: bool = False
) -> ModelCost:
    """Returns the cost of one image's forward in multiply-accumulates, from shapes alone. Local.

    Args:
        model: dense, or made sparse by ``sparsify``, ``pack_units`` and ``insert_token_selectors``; on any device, meta too. It
            stays as it is.
        image_size: pixels, height and width alike. The channels are those of the model's first convolution.
        device: that would multiply; None takes this machine's GPU, or its CPU if it has none.
        training: count a forward in training, for most of it: with the token selectors that are in training only, and the
            classifiers of all selectors. The backward isn't counted.

    Raises:
        OptionError: the model can't take such images; it is a ValueError too.
        TopologyError: the model has no Linear or Conv2d layer, an engine holds only a part of a weight here, or
            ``copy.deepcopy`` can't copy the model.
    """
    model = unwrapped(model)
    refuse_wrapped(model, "count before an engine wraps the model")
    dense = to_dense(_on_meta(model))
    if hasattr(dense, "set_grad_checkpointing"):  # which computes nothing else, and doesn't know the meta device
        cast(Any, dense).set_grad_checkpointing(False)
    layers, selectors = prunable_layers(dense), _macs_of_selectors(dense, training=training)
    in_channels = next((module.in_channels for module in dense.modules() if isinstance(module, nn.Conv2d)), 3)
    try:
        passing = whole = matrix_products(dense, image_size, in_channels)
        if token_selectors(dense):
            remove_token_selectors(dense)
            whole = matrix_products(dense, image_size, in_channels)
    except Exception as error:  # whatever a model raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"{type(model).__name__} can't take such images ({reason})"
        raise OptionError("image_size", image_size, problem, "use the size that it was built for") from error

    numel = {name: layer.weight.numel() for name, layer in layers.items()}
    dense_macs = {name: numel[name] * whole.applications[name] for name in layers} | whole.others | dict.fromkeys(selectors, 0)
    passing_macs = {name: numel[name] * passing.applications[name] for name in layers} | passing.others | selectors
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def cost_of(name: str) -> LayerCost:
        macs = passing_macs[name]
        # The products of packed heads and neurons are in modules within the sparse layer.
        layer = sparse.get(name) or sparse.get(name.rpartition(".")[0])
        if layer is None:
            return LayerCost(name, dense_macs[name], macs, macs)
        active, multiplied = (macs * units // layer.shape.numel() for units in (layer.num_active, layer.num_multiplied(device)))
        return LayerCost(name, dense_macs[name], active, multiplied)

    masks = sum(layer.mask.numel() for layer in sparse.values())
    costs = tuple(cost_of(name) for name in dense_macs)
    return ModelCost(costs, _num_parameters(dense), _num_parameters(model) - masks, device.type)


def _on_meta(model: nn.Module) -> nn.Module:
    """Returns a copy of a model on the meta device, without memory for its weights."""
    tensors = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        tensors[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    return copied(model, tensors)


def _macs_of_selectors(model: nn.Module, *, training: bool) -> dict[str, int]:
    """Returns the multiply-accumulates of a dense model's token selectors, by name.

    In evaluation, selectors that are in training only then do nothing; for ``training`` they drop tokens from now on.
    """
    selectors = {name: module for name, module in model.named_modules() if isinstance(module, TokenSelector)}
    reaching = max((selector.patches.all for selector in selectors.values()), default=0)
    macs: dict[str, int] = {}
    for name, selector in selectors.items():
        if training:
            selector.schedule(replace(selector.patches, until=None))
        if not selector.only_in_training:
            macs[name] = selector.macs(reaching, training=training)
            reaching = selector.num_patches if selector.mode == "gather" else reaching
    return macs


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
