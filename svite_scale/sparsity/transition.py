"""The transition of a layer's packed tensors from one topology to the next."""

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


class TopologyTransition:
    """The change from one mask of a layer to the next.

    Attributes:
        old: uint8 ``[ceil(N / 8)]``, the mask before.
        new: the same, after.
        shape: of the N units.
        kept: bool ``[k]``, the units of the new topology that were in the old one.
    """

    def __init__(self, old: Tensor, new: Tensor, shape: torch.Size, num_active: int) -> None:
        """Compares two masks with ``num_active`` bits set in each; see the attributes."""
        self.old, self.new, self.shape = old, new, shape
        # Numbers from 1 on, moved as bit patterns: a unit that wasn't active before finds a 0.
        numbers = torch.arange(1, num_active + 1, dtype=torch.int32, device=old.device).view(torch.float32)
        self._source = compress(expand(numbers, old, shape), new, num_active).view(torch.int32)
        self.kept = self._source > 0

    def grown_units(self) -> Tensor:
        """Returns the units of the new topology that weren't in the old one, int64, ascending."""
        active = bits.unpack(self.new, self.shape.numel()).nonzero().squeeze(1)
        return active[~self.kept]

    def remap(self, packed: Tensor, grown: float | Tensor = 0.0) -> Tensor:
        """Returns ``[k]`` of the new topology from ``packed``, ``[k]`` of the old one, of any dtype: kept units have their
        values, grown ones ``grown``, a scalar.
        """
        first = torch.as_tensor(grown, dtype=packed.dtype, device=packed.device).view(1)
        return torch.cat([first, packed]).index_select(0, self._source)

    def remap_rows(self, packed: Tensor, repeats: int, grown: float | Tensor = 0.0) -> Tensor:
        """Returns rows of the new topology: those of kept units are copied, those of grown ones are ``grown``.

        Args:
            packed: ``[repeats * k, ...]``, the rows of the k units of the old topology, ``repeats`` times over.
            repeats: see above.
            grown: a scalar, or ``[repeats, grown units, elements of a row]``.
        """
        rows = packed.reshape(repeats, self._source.numel(), -1)
        remapped = rows.index_select(1, (self._source - 1).clamp_(min=0))
        remapped[:, ~self.kept] = torch.as_tensor(grown, dtype=packed.dtype, device=packed.device)
        return remapped.view_as(packed)


def state_kind(name: str, own: Mapping[str, str]) -> str:
    """Returns what an entry of optimizer state means for its weight, one of :data:`STATE_KINDS`.

    Args:
        name: the optimizer's own, such as ``exp_avg``.
        own: kinds by name, of names that :data:`OPTIMIZER_STATE` doesn't know, or that mean something else here.

    Raises:
        TopologyError: the name is unknown.
    """
    kind = own.get(name) or OPTIMIZER_STATE.get(name)
    if kind is None:
        raise TopologyError(
            f"optimizer state {name!r} is unknown, and so is what it starts with for a grown weight; say what it is, one of "
            f"{', '.join(STATE_KINDS)}: TopologyOptions(optimizer_state={{{name!r}: 'gradient'}})"
        )
    return kind


def grown_moment(
    name: str, moment: Tensor, grown: str, initial: Tensor | float = 0.0, own: Mapping[str, str] = OPTIMIZER_STATE
) -> Tensor | float:
    """Returns the first value of one kind of optimizer state of a grown weight.

    Args:
        name: the optimizer's own, such as ``exp_avg``.
        moment: of the weights of the old topology, float.
        grown: ``mean`` starts a second moment at its layer's mean; ``zero`` at 0. A zero second moment makes the first Adam
            steps of the grown weight about three times too large.
        initial: the first value of the grown weight itself.
        own: see :func:`state_kind`, whose errors this raises.
    """
    kind = state_kind(name, own)
    if kind == "weight":
        return initial
    # A step of size 0 would stay 0.
    if kind == "step_size" or (kind == "magnitude" and grown == "mean"):
        return moment.mean()
    return 0.0
