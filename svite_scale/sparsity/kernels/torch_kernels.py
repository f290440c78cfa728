"""The reference: packed weights to dense ones and back in torch operations, for every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from svite_scale.sparsity import bits


def expand(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.expand`. A count that doesn't match is refused on the CPU."""
    active = bits.unpack(mask, shape.numel())
    _check_count(active, values.numel())
    return values.new_zeros(shape.numel()).masked_scatter_(active, values.flatten()).view(shape)


def compress(dense: Tensor, mask: Tensor, num_active: int) -> Tensor:
    """See :func:`svite_scale.sparsity.kernels.compress`. A count that doesn't match is refused on the CPU."""
    if dense.is_meta:
        return dense.new_empty(num_active)
    active = bits.unpack(mask, dense.numel())
    _check_count(active, num_active)
    return dense.flatten().masked_select(active)


def _check_count(active: Tensor, num_active: int) -> None:
    """Checks the count on the CPU only: on an accelerator the host would wait for the device."""
    if active.device.type == "cpu":
        bits.check_count(int(torch.count_nonzero(active)), num_active)
