"""Carrying a layer's packed tensors from one topology to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import compress, expand
from svite_scale.sparsity.options import StateKind

STATE_KINDS: tuple[str, ...] = get_args(StateKind)
OPTIMIZER_STATE: Mapping[str, str] = {
    **dict.fromkeys(("exp_avg", "exp_avg_slow", "exp_avg_diff", "momentum_buffer", "momentum", "grad_avg"), "gradient"),
    **dict.fromkeys(("s", "prev", "last_grad", "neg_pre_grad", "e_w"), "gradient"),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_var", "max_exp_avg_var"), "magnitude"),
    **dict.fromkeys(("exp_hessian_diag_sq", "sum", "square_avg", "acc_delta", "variance", "grad_sum_sq"), "magnitude"),
    **dict.fromkeys(("lookahead_slow_buff", "ax", "x0", "z", "old_p"), "weight"),
    "step_size": "step_size",
}
"""By the name that an optimizer gives it: all elementwise state of torch's and timm's optimizers, of schedule-free ones (``z``)
and of SAM's two steps (``old_p``, ``e_w``)."""


class Remap:
    """From the packed tensors of one mask to those of another.

    Attributes:
        new: uint8 ``[ceil(N / 8)]``, the mask after.
        shape: of the N units.
        stays: bool ``[k]``, the units of the new topology that were in the old one.
    """

    def __init__(self, old: Tensor, new: Tensor, shape: torch.Size, num_active: int) -> None:
        """Args:
        old: uint8 ``[ceil(N / 8)]``, the mask before.
        new: the same, after.
        shape: of the dense weight, N elements.
        num_active: bits set in each.
        """
        self.new, self.shape = new, shape
        # Numbers from 1 on, moved as bit patterns: a weight that wasn't active before finds a 0.
        numbers = torch.arange(1, num_active + 1, dtype=torch.int32, device=old.device).view(torch.float32)
        self._source = compress(expand(numbers, old, shape), new, num_active).view(torch.int32)
        self.stays = self._source > 0

    def grown_units(self) -> Tensor:
        """The units of the new topology that weren't in the old one, int64, ascending."""
        active = bits.unpack(self.new, self.shape.numel()).nonzero().squeeze(1)
        return active[~self.stays]

    def carry(self, packed: Tensor, grown: float | Tensor = 0.0) -> Tensor:
        """``[k]`` to ``[k]``, of any dtype: what stays keeps its value, grown weights get ``grown``, a scalar."""
        first = torch.as_tensor(grown, dtype=packed.dtype, device=packed.device).view(1)
        return torch.cat([first, packed]).index_select(0, self._source)

    def carry_rows(self, packed: Tensor, repeats: int, grown: float | Tensor = 0.0) -> Tensor:
        """``[repeats * k, ...]`` to the same: the rows of units that stay are kept, those of grown ones get ``grown``.

        Args:
            packed: the rows of the k active units, ``repeats`` times over.
            repeats: see above.
            grown: a scalar, or ``[repeats, grown units, elements of a row]``.
        """
        rows = packed.reshape(repeats, self._source.numel(), -1)
        carried = rows.index_select(1, (self._source - 1).clamp_(min=0))
        carried[:, ~self.stays] = torch.as_tensor(grown, dtype=packed.dtype, device=packed.device)
        return carried.view_as(packed)


def state_kind(name: str, own: Mapping[str, str]) -> str:
    """What an entry of optimizer state is to its weight, one of :data:`STATE_KINDS`.

    Args:
        name: the optimizer's own, such as ``exp_avg``.
        own: names that :data:`OPTIMIZER_STATE` doesn't know, or that mean something else here.

    Raises:
        TopologyError: nobody knows it.
    """
    kind = own.get(name) or OPTIMIZER_STATE.get(name)
    if kind is None:
        raise TopologyError(
            f"optimizer state {name!r} is unknown, and so is what it starts with for a grown weight; say what it is, one of "
            f"{', '.join(STATE_KINDS)}: TopologyOptions(optimizer_state={{{name!r}: 'gradient'}})"
        )
    return kind


def grown_moment(
    name: str, moment: Tensor, grown: str, born: Tensor | float = 0.0, own: Mapping[str, str] = OPTIMIZER_STATE
) -> Tensor | float:
    """What one kind of optimizer state of a grown weight starts with.

    Args:
        name: the optimizer's own, such as ``exp_avg``.
        moment: of the weights of the old topology, float.
        grown: ``mean`` starts a second moment at its layer's mean; ``zero`` at 0. A zero second moment makes the first Adam
            steps of the grown weight about three times too large.
        born: what the grown weight itself starts with.
        own: see :func:`state_kind`, whose errors this raises.
    """
    kind = state_kind(name, own)
    if kind == "weight":
        return born
    # A step of size 0 would never grow again.
    if kind == "step_size" or (kind == "magnitude" and grown == "mean"):
        return moment.mean()
    return 0.0
