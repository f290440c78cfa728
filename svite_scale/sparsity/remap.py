"""Carrying a layer's packed tensors from one topology to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from svite_scale.sparsity.kernels import compress, expand

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_inf"})
"""Names that torch's Adam family gives to its running gradient magnitudes."""


class Remap:
    """From the packed tensors of one mask to those of another.

    Attributes:
        stays: bool ``[k]``, the weights of the new topology that were in the old one.
    """

    def __init__(self, old: Tensor, new: Tensor, shape: torch.Size, num_active: int) -> None:
        """Args:
        old: uint8 ``[ceil(N / 8)]``, the mask before.
        new: the same, after.
        shape: of the dense weight, N elements.
        num_active: bits set in each.
        """
        self.new = new
        # Numbers from 1 on, moved as bit patterns: a weight that wasn't active before finds a 0.
        numbers = torch.arange(1, num_active + 1, dtype=torch.int32, device=old.device).view(torch.float32)
        self._source = compress(expand(numbers, old, shape), new, num_active).view(torch.int32)
        self.stays = self._source > 0

    def carry(self, packed: Tensor, grown: float | Tensor = 0.0) -> Tensor:
        """``[k]`` to ``[k]``, of any dtype: what stays keeps its value, grown weights get ``grown``."""
        first = torch.as_tensor(grown, dtype=packed.dtype, device=packed.device).view(1)
        return torch.cat([first, packed]).index_select(0, self._source)

    def carry_moment(self, name: str, moment: Tensor, grown: str) -> Tensor:
        """:meth:`carry` for one kind of optimizer state, fp32 ``[k]``.

        Args:
            name: the optimizer's own, such as ``exp_avg``.
            moment: of the weights of the old topology.
            grown: ``mean`` starts a grown weight's second moment at its layer's mean; ``zero`` at 0. A zero second moment makes
                the first Adam steps of the grown weight about three times too large.
        """
        return self.carry(moment, moment.mean() if grown == "mean" and name in SECOND_MOMENTS else 0.0)
