"""Packed layers: the modules that hold a packed weight in place of a dense one, and the products with it.

A packed weight of N elements with k active ones is ``values`` (float ``[k]``, ascending flat position) and ``mask`` (uint8
``[ceil(N / 8)]``). In the products the dense weight exists only inside a forward or a backward of its layer: autograd keeps
``values`` and ``mask``. The products, and reading the dense weight, can be differentiated again, and by ``torch.func``.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor, nn
from torch.autograd.function import Function

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits, kernels
from svite_scale.sparsity.block_grid import SINGLE, BlockGrid
from svite_scale.sparsity.kernels.operators import compress, expand, expand_again, record_gradient
from svite_scale.sparsity.layers.base import LayerContext, SparseLayer, UnitParameter, filled, with_signature
from svite_scale.sparsity.layers.dense_weight import DenseWeight
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
"""Arguments of nn.Conv2d, but for its bias."""


class PackedLayer(SparseLayer):
    """Base of packed layers: ``values``, ``mask``, ``bias``, and the shape of the dense weight that they stand for.

    A packed layer is an instance of the class of the layer that it replaces, with that class's public attributes.

    Attributes:
        values: trainable float parameter, ``[num_active]``, in ascending flat position; its own shape an engine may hide.
        bias: the dense layer's own bias, or None.
        weight: the dense weight, of ``grid.shape``; see :attr:`weight`.
        grid: the dense weight's shape, and its division into units.
        gradient_hook: takes the gradient of the dense weight, shaped like the weight.
    """

    unit = "weights"
    grid: BlockGrid
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear | nn.Conv2d, num_active: int, name: str, block: tuple[int, int] = SINGLE) -> None:
        """Replaces ``dense``, and shares its bias; :meth:`set_weight` fills ``values`` and ``mask``."""
        nn.Module.__init__(self)  # not the dense class's, which would make a weight
        weight = dense.weight
        self.grid = BlockGrid(weight.shape, block)
        if not 0 < num_active <= self.grid.num_blocks:
            raise TopologyError(f"{name}: {num_active} active {self.unit} don't fit a weight of shape {tuple(weight.shape)}")
        self.name, self.num_active, self.shape = name, num_active, self.grid.grid
        self.values = nn.Parameter(weight.new_zeros(num_active, *self.value_shape))
        self.mask = Mask(torch.zeros(bits.num_bytes(self.grid.num_blocks), dtype=torch.uint8, device=weight.device))
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        self.train(dense.training)

    @torch.no_grad()
    def set_weight(self, dense: Tensor, active: Tensor) -> None:
        """Packs a dense weight.

        Args:
            dense: of the shape of the weight.
            active: bool ``[N]`` with ``num_active`` set.
        """
        if (found := int(active.sum())) != self.num_active:
            raise TopologyError(f"{self.name}: the mask has {found} active {self.unit}, the layer {self.num_active}")
        self.mask.copy_(bits.pack(active))
        self.take_active(dense)

    @torch.no_grad()
    def scale_by_fan_in(self) -> None:
        """Multiplies the values, so that the layer's outputs have the spread that the dense weight's have."""
        self.values.mul_(self.fan_in_factor())

    def fan_in_factor(self) -> float | Tensor:
        """Returns the root of the layer's inputs over the active ones of an output, on average."""
        return math.sqrt(self.grid.num_blocks / self.num_active)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of what ``values`` has of one unit."""
        return ()

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Returns the dense weight; on a module whose parameters aren't sharded."""
        return self.read_dense(self.values, self.mask)

    def read_dense(self, values: Tensor, mask: Tensor) -> Tensor:
        """Returns the dense weight that ``values`` and ``mask`` stand for. Differentiable."""
        return read_dense(values, mask, self.shape, self.handle)

    def record_gradient(self, gradient: Tensor, *inputs: Tensor) -> None:
        """Passes the gradient of the dense weight to the gradient hook, inside backward."""
        assert self.gradient_hook is not None
        self.gradient_hook(gradient)

    @property
    def growth_numel(self) -> int:
        return self.grid.shape.numel()

    def num_multiplied(self, device: torch.device) -> int:
        """Returns N: the products are dense ones."""
        return self.grid.num_blocks

    def unit_parameters(self) -> dict[str, UnitParameter]:
        return {"values": UnitParameter(self.values)}

    def importance(self, context: LayerContext) -> Tensor:
        """Returns the dense weight, 0 where inactive."""
        return kernels.expand(context.read(self.values), context.mask, torch.Size([self.shape.numel()]))

    def growth_scores(self, context: LayerContext) -> Tensor:
        """Returns the magnitude of the dense gradient."""
        return context.gather()

    @property
    def weight(self) -> Tensor:
        """The dense weight, 0 where inactive, made again by each read.

        It is differentiable as the layer's own product is, so modules that read their layers' weights train them too. What is
        written into it reaches the active weights, so ``nn.init`` draws them again; see
        :class:`~svite_scale.sparsity.layers.dense_weight.DenseWeight`.

        Raises:
            TopologyError: an engine holds only a part of the layer here; or on assignment.
        """
        values, mask = self.values, self.mask
        if values.numel() != self.num_active * self.grid.block_numel or hasattr(values, "to_local"):
            raise TopologyError(
                f"{self.name}.weight: an engine holds only a part of it here; read it inside the forward of the module that "
                "the engine gathers it for"
            )
        return DenseWeight.of(self.read_dense(values, mask), self)

    @weight.setter
    def weight(self, value: object) -> None:
        self.register_parameter("weight", None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter as any module does; refuses the name ``weight``, which would take no part in the product."""
        if name == "weight":
            raise TopologyError(
                f"{self.name}.weight can't be replaced, for it is packed; write into it: weight.copy_(new), in no_grad()"
            )
        super().register_parameter(name, param)

    @torch.no_grad()
    def take_active(self, dense: Tensor) -> None:
        """Copies the active weights from ``dense``, of the weight's shape; its other elements are ignored."""
        self.values.copy_(kernels.compress(dense, self.mask, self.num_active))

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """Returns the dtype that the product computes in: autocast's where it is on, else the input's.

        Raises:
            TopologyError: the input isn't of floats.
        """
        if not x.dtype.is_floating_point:
            raise TopologyError(
                f"{self.name}: its input is {x.dtype}, and its weights are {self.values.dtype}; convert the input"
            )
        device_type = x.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta knows no autocast
            return torch.get_autocast_dtype(device_type)
        return x.dtype

    def extra_repr(self) -> str:
        return f"shape={tuple(self.grid.shape)}, num_active={self.num_active}, bias={self.bias is not None}"


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[misc]  # bias may be None
    """``nn.Linear`` with a packed weight: ``[..., in_features]`` to ``[..., out_features]``."""

    def __init__(self, dense: nn.Linear, num_active: int, name: str, block: tuple[int, int] = SINGLE) -> None:
        super().__init__(dense, num_active, name, block)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._product_dtype(x))
        return cast(Tensor, PackedLinearProduct.apply(x, self.values, self.mask, self.bias, self.shape, self.handle))

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return filled(dense, self.dense_weight(), self.bias, self, self.values)


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc]  # bias may be None
    """``nn.Conv2d`` with a packed weight: ``[batch, in, height, width]`` to ``[batch, out, height', width']``, or one image."""

    def __init__(self, dense: nn.Conv2d, num_active: int, name: str, block: tuple[int, int] = SINGLE) -> None:
        super().__init__(dense, num_active, name, block)
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
        return cast(Tensor, PackedConv2dProduct.apply(x, self.values, self.mask, self.bias, self.shape, options, self.handle))

    def to_dense(self) -> nn.Conv2d:
        options: dict[str, Any] = {attribute: getattr(self, attribute) for attribute in CONVOLUTION}
        dense = nn.Conv2d(**options, bias=self.bias is not None, device="meta")
        return filled(dense, self.dense_weight(), self.bias, self, self.values)


class DenseRead(Function):
    """The dense weight, 0 where inactive."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(values: Tensor, mask: Tensor, shape: torch.Size, handle: Tensor | None) -> Tensor:
        return expand(values, mask, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, mask, _, handle = inputs
        ctx.save_for_backward(values, mask, handle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, mask, handle = ctx.saved_tensors
        return _packed_gradient(gradient, values, mask, handle), None, None, None


class ActiveRead(Function):
    """The active elements of a dense tensor, ``[k]``: the inverse of :class:`DenseRead`, and its gradient."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
        return compress(dense, mask, num_active)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, mask, _ = inputs
        ctx.save_for_backward(mask)
        ctx.shape = dense.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return read_again(gradient, mask, ctx.shape), None, None


def read_dense(values: Tensor, mask: Tensor, shape: torch.Size, handle: Tensor | None = None) -> Tensor:
    """Returns the dense weight of ``shape``. Its gradient goes to ``values`` where active, and whole to the layer's hook."""
    return cast(Tensor, DenseRead.apply(values, mask, shape, handle))


def read_again(values: Tensor, mask: Tensor, shape: torch.Size, handle: Tensor | None = None) -> Tensor:
    """Returns what :func:`read_dense` does, in a backward."""
    if not torch.is_grad_enabled():  # a function of autograd would only take time
        return expand_again(values, mask, shape)
    return read_dense(values, mask, shape, handle)


class PackedLinearProduct(Function):
    """``F.linear`` on a packed weight."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, shape: torch.Size, handle: Tensor | None
    ) -> Tensor:
        return F.linear(x, expand(values.to(x.dtype), mask, shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, mask, _, ctx.shape, handle = inputs
        ctx.save_for_backward(x, values, mask, handle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask, handle = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ read_again(values.to(grad.dtype), mask, ctx.shape, handle)
        rows = torch.atleast_2d(grad).flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_values = _packed_gradient(rows.t() @ torch.atleast_2d(x).flatten(0, -2), values, mask, handle)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_values, None, grad_bias, None, None


class PackedConv2dProduct(Function):
    """``F.conv2d`` on a packed weight, of a batch, with ``stride``, ``padding``, ``dilation`` and ``groups`` in ``options``."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        values: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        options: dict[str, Any],
        handle: Tensor | None,
    ) -> Tensor:
        weight = expand(values.to(x.dtype), mask, shape)
        return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, mask, _, ctx.shape, ctx.options, handle = inputs
        ctx.save_for_backward(x, values, mask, handle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask, handle = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = read_again(values.to(grad.dtype), mask, ctx.shape, handle)
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, **ctx.options)
        if ctx.needs_input_grad[1]:
            dense = torch.nn.grad.conv2d_weight(x, ctx.shape, grad, **ctx.options)
            grad_values = _packed_gradient(dense, values, mask, handle)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_values, None, grad_bias, None, None, None


def _packed_gradient(dense: Tensor, values: Tensor, mask: Tensor, handle: Tensor | None) -> Tensor:
    """Returns the active elements of the dense gradient, which the layer's hook gets whole."""
    if handle is not None:
        record_gradient(dense.detach(), None, None, handle)
    if not torch.is_grad_enabled():
        return compress(dense, mask, values.numel()).to(values.dtype)
    return cast(Tensor, ActiveRead.apply(dense, mask, values.numel())).to(values.dtype)
