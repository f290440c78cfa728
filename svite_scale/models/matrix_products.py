"""Multiply-accumulates of one image's forward, product by product, on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from svite_scale.sparsity.packing import prunable_layers


@dataclass(frozen=True)
class MatrixProducts:
    """The products that a forward of one image computes.

    Attributes:
        applications: by prunable layer, how often its weight is applied: multiply-accumulates per element of the weight.
        others: by module, the multiply-accumulates of its products without the weight of a prunable layer, such as queries
            times keys; modules without any aren't listed.
        output: the forward's.
    """

    applications: dict[str, int]
    others: dict[str, int]
    output: Any


@torch.no_grad()
def matrix_products(model: nn.Module, image_size: int, in_channels: int) -> MatrixProducts:
    """Sends one image through a dense model on the meta device, in evaluation mode, and counts.

    Every product that torch's own counter knows counts: of matrices, convolutions, and attention, fused or not. It belongs to
    the prunable layer whose weight takes part in it, also where a module reads that weight instead of calling the layer.

    Args:
        model: on the meta device; it is left in evaluation mode, and its weights are frozen.
        image_size: pixels, height and width alike.
        in_channels: of the image.

    Raises:
        Exception: whatever the model raises on images of that size.
    """
    # Where a weight is a module's input (CaiT's class token), the tracker of modules would look for its gradient.
    model.eval().requires_grad_(False)
    layers = prunable_layers(model)
    image = torch.empty(1, in_channels, image_size, image_size, device="meta")
    counted = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counted, ModuleTracker() as tracker, _ByOwner(layers, counted, tracker) as owners:
        output = model(image)
    applications = {name: owners.macs.pop(name, 0) // layer.weight.numel() for name, layer in layers.items()}
    return MatrixProducts(applications, dict(owners.macs), output)


class _ByOwner(TorchFunctionMode):
    """Adds up multiply-accumulates by the prunable layer whose weight takes part in a product, else by the innermost module.

    Attributes:
        macs: by the name of the layer, or module.
    """

    def __init__(self, layers: dict[str, nn.Linear | nn.Conv2d], counted: FlopCounterMode, tracker: ModuleTracker) -> None:
        super().__init__()
        self._names = {id(layer.weight): name for name, layer in layers.items()}
        self._views: list[Tensor] = []
        self._counted, self._tracker = counted, tracker
        self.macs: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = self._counted.get_total_flops()
        result = func(*args, **kwargs)
        layer = next((self._names[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._names), None)
        # A multiply and an add are two operations to torch.
        if macs := (self._counted.get_total_flops() - before) // 2:
            # The tracker's names begin with the class of the whole model.
            self.macs[layer or max(self._tracker.parents, key=len).partition(".")[2]] += macs
        elif layer and isinstance(result, Tensor):
            # A weight that is transposed first, as by the linear function that ZeRO-3 puts in the place of torch's.
            self._names[id(result)] = layer
            self._views.append(result)
        return result
