"""The modules that hold a packed weight in place of a dense one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from svite_scale.errors import NoWeightError, TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import compress, expand
from svite_scale.sparsity.packed_weight import Convolution, PackedConv2dProduct, PackedLinearProduct
from svite_scale.sparsity.sparse_layer import Gather, MovingTensor, Read, SparseLayer, sparse_layers


class PackedLayer(SparseLayer):
    """What packed layers share: ``values``, ``mask``, ``bias``, and the shape of the dense weight they stand for.

    Attributes:
        values: trainable float parameter, ``[num_active]``, in ascending flat position; its own shape an engine may hide.
        bias: the dense layer's own bias, or None.
        shape: shape of the dense weight, N elements.
        gradient_sink: takes the dense weight gradient, shaped like the weight.
    """

    unit = "weights"
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear | nn.Conv2d, num_active: int, name: str) -> None:
        """Takes the place of ``dense``, with its bias; :meth:`set_weight` fills ``values`` and ``mask``."""
        super().__init__()
        weight = dense.weight
        if not 0 < num_active <= weight.numel():
            raise TopologyError(f"{name}: {num_active} active weights don't fit a weight of shape {tuple(weight.shape)}")
        self.name, self.num_active, self.shape = name, num_active, weight.shape
        self.values = nn.Parameter(weight.new_zeros(num_active))
        mask = torch.zeros(bits.num_bytes(weight.numel()), dtype=torch.uint8, device=weight.device)
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        self.train(dense.training)

    @torch.no_grad()
    def set_weight(self, dense: Tensor, active: Tensor) -> None:
        """Packs a dense weight.

        Args:
            dense: like the layer's ``shape``.
            active: bool ``[N]`` with ``num_active`` set.
        """
        if int(active.sum()) != self.num_active:
            raise TopologyError(f"{self.name}: the mask has {int(active.sum())} active weights, the layer {self.num_active}")
        self.mask.copy_(bits.pack(active))
        self.values.copy_(compress(dense, self.mask, self.num_active))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The dense weight, of ``shape``; on a module whose parameters aren't sharded."""
        return expand(self.values, self.mask, self.shape)

    @property
    def growth_numel(self) -> int:
        return self.shape.numel()

    def moving(self) -> dict[str, MovingTensor]:
        return {"values": MovingTensor(self.values)}

    def importance(self, read: Read, gather: Gather, mask: Tensor) -> Tensor:
        """The dense weight, 0 where inactive."""
        return expand(read(self.values), mask, torch.Size([self.shape.numel()]))

    def growth_scores(self, gather: Gather) -> Tensor:
        """Magnitude of the dense gradient."""
        return gather()

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Asked for what isn't there, among others by modules that read a Linear's weight past its forward."""
        if name == "weight":
            raise NoWeightError(
                f"{type(self).__name__} {self.name} has no dense weight, and what asks for it can't run on a packed one; list "
                "the layer in keep_dense"
            )
        return super().__getattr__(name)

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """What the product computes in: autocast's dtype where it is on, else the input's."""
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):  # meta knows none
            return torch.get_autocast_dtype(device_type)
        return x.dtype

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, num_active={self.num_active}, bias={self.bias is not None}"


class PackedLinear(PackedLayer):
    """``nn.Linear`` with a packed weight: ``[..., in_features]`` to ``[..., out_features]``."""

    def __init__(self, dense: nn.Linear, num_active: int, name: str) -> None:
        super().__init__(dense, num_active, name)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._product_dtype(x))
        return cast(Tensor, PackedLinearProduct.apply(x, self.values, self.mask, self.bias, self.shape, self.gradient_sink))


class PackedConv2d(PackedLayer):
    """``nn.Conv2d`` with a packed weight: ``[batch, in, height, width]`` to ``[batch, out, height', width']``."""

    def __init__(self, dense: nn.Conv2d, num_active: int, name: str) -> None:
        super().__init__(dense, num_active, name)
        if dense.padding_mode != "zeros" or isinstance(dense.padding, str):
            raise TopologyError(
                f"{name}: can't pack a Conv2d of padding {dense.padding!r}, mode {dense.padding_mode!r}; list it in keep_dense"
            )
        self.convolution = Convolution(
            cast(tuple[int, int], dense.stride),
            dense.padding,  # type: ignore[arg-type]
            cast(tuple[int, int], dense.dilation),
            dense.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._product_dtype(x))
        return cast(
            Tensor,
            PackedConv2dProduct.apply(x, self.values, self.mask, self.bias, self.shape, self.convolution, self.gradient_sink),
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model, wrapped by an engine or not, by their names in it, in order of registration."""
    return {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, PackedLayer)}
