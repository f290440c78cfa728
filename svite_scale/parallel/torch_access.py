"""Reading and writing parameters that a torch optimizer steps: plain tensors and FSDP2's DTensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from svite_scale.errors import TopologyError
from svite_scale.parallel.moments import elementwise
from svite_scale.sparsity.sharding import chunk_numel, gather_chunks, rank_and_size, rank_chunk


class TorchAccess:
    """A :class:`~svite_scale.sparsity.access.ParameterAccess` for one process, DDP and FSDP2.

    Under FSDP2 the next forward gathers and casts the sharded fp32 values anew, so writing these is all there is to do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer`` steps the wrapped model's parameters."""
        self.optimizer = optimizer

    def steps(self, parameter: nn.Parameter) -> bool:
        return any(parameter is stepped for group in self.optimizer.param_groups for stepped in group["params"])

    def read(self, parameter: nn.Parameter) -> Tensor:
        return _full(parameter.detach())

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        _copy(parameter.detach(), value)

    def moment_names(self, parameter: nn.Parameter) -> list[str]:
        return list(elementwise(self.optimizer.state.get(parameter, {}), parameter.shape))

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        return _full(self.optimizer.state[parameter][name])

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        _copy(self.optimizer.state[parameter][name], value)

    def local_values(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        values = parameter.detach()
        if not isinstance(values, DTensor):
            return values.view(-1), 0
        rank, world_size = rank_and_size(values.device_mesh.get_group())
        num_rows = values.shape[0]
        return values.to_local().view(-1), rank * chunk_numel(num_rows, world_size) * (values.numel() // num_rows)


def check_placement(name: str, tensor: Tensor) -> None:
    """Refuses what this access couldn't write: a DTensor over several mesh axes, or along another dimension.

    Raises:
        TopologyError: names it.
    """
    if isinstance(tensor, DTensor) and tensor.placements != (Shard(0),):
        raise TopologyError(f"{name} is placed as {tensor.placements}; shard it over one mesh axis, along dimension 0")


def _full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dim() == 1 and tensor.placements == (Shard(0),):
        # As packed values are; full_tensor() would hold them several times meanwhile.
        return gather_chunks(tensor.to_local(), tensor.numel(), tensor.device_mesh.get_group())
    return tensor.full_tensor()


def _copy(tensor: Tensor, value: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(value)
        return
    tensor.to_local().copy_(rank_chunk(value, *rank_and_size(tensor.device_mesh.get_group())))
