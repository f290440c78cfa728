"""The modules that hold a packed weight in place of a dense one."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.dense import filled
from svite_scale.sparsity.kernels import compress, expand
from svite_scale.sparsity.layers.base import Gather, MovingTensor, Read, SparseLayer, sparse_layers
from svite_scale.sparsity.layers.dense_weight import DenseWeight
from svite_scale.sparsity.layers.packed_weight import PackedConv2dProduct, PackedLinearProduct, read_dense
from svite_scale.sparsity.mask import Mask

CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
"""What nn.Conv2d is made from, but for its bias."""


class PackedLayer(SparseLayer):
    """What packed layers share: ``values``, ``mask``, ``bias``, and the shape of the dense weight they stand for.

    A packed layer is an instance of the class whose place it takes, with that class's public attributes.

    Attributes:
        values: trainable float parameter, ``[num_active]``, in ascending flat position; its own shape an engine may hide.
        bias: the dense layer's own bias, or None.
        weight: the dense weight, of ``shape``; see :attr:`weight`.
        shape: shape of the dense weight, N elements.
        gradient_sink: takes the dense weight gradient, shaped like the weight.
    """

    unit = "weights"
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear | nn.Conv2d, num_active: int, name: str) -> None:
        """Takes the place of ``dense``, with its bias; :meth:`set_weight` fills ``values`` and ``mask``."""
        nn.Module.__init__(self)  # not the dense class's, which would make a weight
        weight = dense.weight
        if not 0 < num_active <= weight.numel():
            raise TopologyError(f"{name}: {num_active} active weights don't fit a weight of shape {tuple(weight.shape)}")
        self.name, self.num_active, self.shape = name, num_active, weight.shape
        self.values = nn.Parameter(weight.new_zeros(num_active))
        self.mask = Mask(torch.zeros(bits.num_bytes(weight.numel()), dtype=torch.uint8, device=weight.device))
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
        self.take_active(dense)

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

    @property
    def weight(self) -> Tensor:
        """The dense weight, of ``shape``, 0 where inactive, made anew by each read.

        It is differentiable as the layer's own product is, so modules that read their layers' weights train them too. What is
        written into it reaches the active weights, so ``nn.init`` draws them anew; see
        :class:`~svite_scale.sparsity.layers.dense_weight.DenseWeight`.

        Raises:
            TopologyError: an engine holds but a part of the layer here; or on assignment.
        """
        values, mask = self.values, self.mask
        if values.numel() != self.num_active or hasattr(values, "to_local"):
            raise TopologyError(
                f"{self.name}.weight: an engine holds only a part of it here; read it inside the forward of the module that "
                "the engine gathers it for"
            )
        dense = read_dense(values, mask, self.shape, self.gradient_sink)
        return DenseWeight.of(dense, self)

    @weight.setter
    def weight(self, value: object) -> None:
        self.register_parameter("weight", None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's, but for the name ``weight``, under which a parameter would take no part in the product."""
        if name == "weight":
            raise TopologyError(
                f"{self.name}.weight can't be replaced, for it is packed; write into it: weight.copy_(new), in no_grad()"
            )
        super().register_parameter(name, param)

    @torch.no_grad()
    def take_active(self, dense: Tensor) -> None:
        """Gives the active weights the values that they have in ``dense``, of ``shape``; what else it holds is dropped."""
        self.values.copy_(compress(dense, self.mask, self.num_active))

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """What the product computes in: autocast's dtype where it is on, else the input's."""
        device_type = x.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta knows no autocast
            return torch.get_autocast_dtype(device_type)
        return x.dtype

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, num_active={self.num_active}, bias={self.bias is not None}"


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[misc]  # bias may be None
    """``nn.Linear`` with a packed weight: ``[..., in_features]`` to ``[..., out_features]``."""

    def __init__(self, dense: nn.Linear, num_active: int, name: str) -> None:
        super().__init__(dense, num_active, name)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._product_dtype(x))
        return cast(Tensor, PackedLinearProduct.apply(x, self.values, self.mask, self.bias, self.shape, self.gradient_sink))

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return filled(dense, self.dense_weight(), self.bias, self, self.values)


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc]  # bias may be None
    """``nn.Conv2d`` with a packed weight: ``[batch, in, height, width]`` to ``[batch, out, height', width']``, or one image."""

    def __init__(self, dense: nn.Conv2d, num_active: int, name: str) -> None:
        super().__init__(dense, num_active, name)
        for attribute in CONVOLUTION:
            setattr(self, attribute, getattr(dense, attribute))
        self.transposed, self.output_padding = dense.transposed, dense.output_padding
        # Private, but what nn.Conv2d's inherited methods read; (left, right, top, bottom), of padding "same" too.
        self._reversed_padding_repeated_twice = dense._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._product_dtype(x))
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        options = {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}
        sink = self.gradient_sink
        return cast(Tensor, PackedConv2dProduct.apply(x, self.values, self.mask, self.bias, self.shape, options, sink))

    def to_dense(self) -> nn.Conv2d:
        options: dict[str, Any] = {attribute: getattr(self, attribute) for attribute in CONVOLUTION}
        dense = nn.Conv2d(**options, bias=self.bias is not None, device="meta")
        return filled(dense, self.dense_weight(), self.bias, self, self.values)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model, wrapped by an engine or not, by their names in it, in order of registration."""
    return {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, PackedLayer)}
