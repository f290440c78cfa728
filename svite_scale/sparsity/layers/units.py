"""Layers of whole units, neurons or heads, of which only the active ones exist.

The weights of an absent unit are nowhere: not in memory, not in a product, not on the wire. So an absent unit has no gradient
by which it could be grown. Its candidate has one. A candidate has incoming weights drawn from (seed, update, layer, unit), and
outgoing weights of zero. During growth windows the layer computes the gradient that the candidate's outgoing weights would
receive: this is its score. A grown unit starts as its candidate, so it doesn't change the function. Its outgoing weights learn
in the next step, and its incoming weights in the step after.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from svite_scale.sparsity import bits
from svite_scale.sparsity.hashing import hashed_uniform
from svite_scale.sparsity.kernels.operators import record_gradient
from svite_scale.sparsity.layers.base import SparseLayer, filled, with_signature
from svite_scale.sparsity.mask import Mask


class UnitLayer(SparseLayer):
    """A :class:`~svite_scale.sparsity.layers.base.SparseLayer` of whole units.

    Attributes:
        seed: of the first mask and of candidates.
        candidate_std: standard deviation of candidates' incoming weights.
        candidate_numel: incoming weights of one unit.
        out_features: of the layer.
        max_moved: most units that an update may move; None for any number.
    """

    max_moved: ClassVar[int | None] = None
    seed: int
    candidate_std: float
    candidate_numel: int
    out_features: int

    def set_up(self, name: str, active: Tensor, seed: int, incoming: Tensor, out_features: int) -> None:
        """Sets the attributes that all layers of units have.

        Args:
            name: of the layer.
            active: bool ``[N]``.
            seed: of the run.
            incoming: the dense layer's incoming weights, whose spread candidates take on.
            out_features: of the layer.
        """
        self.name, self.shape, self.num_active = name, torch.Size([active.numel()]), int(active.count_nonzero())
        self.seed, self.out_features = seed, out_features
        self.candidate_numel = incoming.numel() // active.numel()
        self.candidate_std = 1.0 if incoming.is_meta else float(incoming.detach().float().std())
        self.mask = Mask(bits.pack(active).to(incoming.device))

    @property
    def outgoing(self) -> TransposedLinear:
        """The layer whose rows are the outgoing weights of units."""
        raise NotImplementedError

    @torch.no_grad()
    def scale_by_fan_in(self) -> None:
        """Multiplies the outgoing weights by the root of all units over the active ones, so that the layer's outputs have the
        spread that they have with all units.
        """
        self.outgoing.weight.mul_(math.sqrt(self.shape.numel() / self.num_active))

    def name_at(self, path: str) -> str:
        return f"{path}.{self.unit}" if path else self.name

    def active_units(self) -> Tensor:
        """Returns bool ``[N]``. For use where the layer's parameters are whole: inside its forward and backward."""
        return bits.unpack(self.mask, self.shape.numel())

    def initial_units(self, active: Tensor) -> Tensor:
        """Returns the active units, int64 ``[k]``, on the layer's device, which may be meta."""
        return active.nonzero().squeeze(1).to(self.mask.device)

    def candidates(self, units: Tensor) -> Tensor:
        """Returns the incoming weights of candidates for the next update, fp32 ``[units, candidate_numel]``.

        Args:
            units: bool ``[N]``, or int64 ``[any]``.
        """
        numel = self.shape.numel() * self.candidate_numel
        uniform = hashed_uniform(self.seed, self.update_step, f"{self.name}/candidates", numel, units.device)
        # A uniform number of variance 1/12, moved to mean 0 and to the spread of the layer's first weights.
        return (uniform.view(-1, self.candidate_numel)[units] - 0.5) * (12**0.5 * self.candidate_std)

    @torch.no_grad()
    def all_units(self, rows: Tensor, repeats: int = 1) -> Tensor:
        """Returns ``[repeats * k * any, ...]`` of active units as ``[repeats * N * any, ...]``, with zeros for absent ones."""
        active = self.active_units()
        whole = rows.new_zeros(repeats, active.numel(), rows.numel() // (repeats * self.num_active))
        whole[:, active] = rows.reshape(repeats, self.num_active, -1)
        return whole.view(-1, *rows.shape[1:])

    def dense_linear(self, weight: Tensor, bias: Tensor | None, trained: nn.Parameter) -> nn.Linear:
        """Returns a Linear of this weight, ``[out, in]``; see :func:`~svite_scale.sparsity.layers.base.filled`."""
        empty = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        return filled(empty, weight, bias, self, trained)

    def recorded(self, output: Tensor, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Returns the layer's output, from whose gradient growth scores are recorded in growth windows.

        Args:
            output: ``[B, tokens, out]``.
            x: the layer's input, ``[B, tokens, in]``.
            attn_mask: of an attention.
        """
        if not torch.is_grad_enabled():
            return output
        return cast(Tensor, RecordedOutput.apply(output, x, attn_mask, self.handle))


class RecordedOutput(Function):
    """A unit layer's output; its gradient is given to the layer too, with the layer's input, if the layer has a hook."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(output: Tensor, x: Tensor, attn_mask: Tensor | None, handle: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *saved = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, attn_mask, handle = ctx.saved_tensors
        record_gradient(gradient.detach(), x.detach(), attn_mask, handle)
        return gradient, None, None, None


class TransposedLinear(nn.Module):
    """``nn.Linear`` whose weight is stored as ``[in_features, out_features]``, so that its rows belong to units."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """``weight`` is ``[in_features, out_features]``; ``bias`` the dense layer's own."""
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return nn.functional.linear(x, self.weight.t(), self.bias)


class RowLinear(nn.Module):
    """Some rows of an ``nn.Linear``; a type of its own, so that its weights aren't packed again."""

    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear, rows: Tensor) -> None:
        """``rows`` is int64 ``[any]``."""
        super().__init__()
        self.weight = nn.Parameter(dense.weight.detach()[rows])
        bias: Tensor | None = dense.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()[rows]))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., rows]``."""
        return nn.functional.linear(x, self.weight, self.bias)
