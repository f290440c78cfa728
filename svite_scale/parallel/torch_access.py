"""Reading and writing parameters that a torch optimizer steps: plain tensors and FSDP2's DTensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from svite_scale.errors import TopologyError
from svite_scale.parallel.moments import elementwise
from svite_scale.sparsity.ever_active import rank_chunk


class TorchAccess:
    """A :class:`~svite_scale.sparsity.access.ParameterAccess` for one process, DDP and FSDP2.

    Under FSDP2 the next forward gathers and casts the sharded fp32 values anew, so writing these is all there is to do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer`` steps the wrapped model's parameters."""
        self.optimizer = optimizer

    def read(self, parameter: nn.Parameter) -> Tensor:
        return _full(parameter.detach())

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        _copy(parameter.detach(), value)

    def read_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = elementwise(self.optimizer.state.get(parameter, {}), parameter.shape)
        return {name: _full(moment) for name, moment in state.items()}

    def write_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        for name, moment in moments.items():
            _copy(self.optimizer.state[parameter][name], moment)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy(tensor: Tensor, value: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(value)
        return
    if tensor.placements != (Shard(0),):
        raise TopologyError(
            f"can't write a tensor placed as {tensor.placements}; shard it over one mesh axis, along dimension 0"
        )
    group = tensor.device_mesh.get_group()
    tensor.to_local().copy_(rank_chunk(value, dist.get_rank(group), dist.get_world_size(group)))
