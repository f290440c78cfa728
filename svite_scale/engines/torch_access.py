"""Reading and writing parameters that a torch optimizer steps: plain tensors and FSDP2's DTensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from svite_scale.engines.moments import REMEDY, elementwise
from svite_scale.engines.optimizers import optimizers_in, steppers_in, stray_tensors
from svite_scale.errors import TopologyError
from svite_scale.sparsity.sharding import chunk_numel, gather_equal, padded, rank_and_size, rank_chunk


class TorchAccess:
    """A :class:`~svite_scale.sparsity.access.ParameterAccess` for one process, DDP and FSDP2.

    Under FSDP2 the next forward gathers and casts the sharded fp32 values again, so only these are written.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        """Finds the optimizers.

        Args:
            model: as it was wrapped.
            optimizer: steps its parameters: a torch optimizer, or what holds some.

        Raises:
            TopologyError: the optimizer holds none, or one whose state can't be found.
        """
        self._model = model
        self.reshard()
        self.steppers = steppers_in(optimizer)
        self._optimizer, self._holders = optimizer, optimizers_in(optimizer)
        if len(_parameter_ids(self._holders)) > len(_parameter_ids(self.steppers)):
            outer, *_ = (type(holder).__name__ for holder in self._holders)
            raise TopologyError(
                f"{outer} hands only some of its parameters on to the optimizer in it: this rank can't reach the state of all; "
                "to shard it, use FSDP2's fully_shard or DeepSpeed ZeRO stage 1"
            )

    def reshard(self) -> None:
        reshard(self._model)

    def steps(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in _parameter_ids(self.steppers)

    def read(self, parameter: nn.Parameter) -> Tensor:
        return _full(parameter.detach())

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        _copy(parameter.detach(), value)

    def check_state(self, parameter: nn.Parameter, *, stepped: bool) -> None:
        self._holders = optimizers_in(
            self._optimizer
        )  # again, because a wrapper may make its inner optimizer at the first step
        state = self._state(parameter)
        larger = stepped and not state
        for stray in stray_tensors(self._optimizer, parameter, _local(parameter), larger=larger):
            raise TopologyError(
                f"{stray} seems to hold an entry per weight, but isn't in the optimizer's state, so it can't follow moving "
                f"weights; {REMEDY}"
            )
        if stepped and not state and self._keeps_state_of_others(parameter):
            names = ", ".join(type(optimizer).__name__ for optimizer in self.steppers)
            raise TopologyError(f"{names} keeps state of other parameters of the group, but none of this; {REMEDY}")
        if stepped and _differs_between_ranks(parameter.detach()):
            raise TopologyError(
                "it differs between ranks, so the topology would too; DDP averages no gradients of what was frozen when it "
                "wrapped the model: wrap that in DDP again after thawing"
            )

    def moment_names(self, parameter: nn.Parameter) -> list[str]:
        return list(self._state(parameter))

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        return _full(self._state(parameter)[name])

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        _copy(self._state(parameter)[name], value)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Returns a parameter's elementwise state in all optimizers: a wrapper and the optimizer in it may both have some."""
        found: dict[str, Tensor] = {}
        for optimizer in self._holders:
            for name, tensor in elementwise(_state_of(optimizer, parameter), parameter.shape).items():
                if found.setdefault(name, tensor) is not tensor:
                    raise TopologyError(f"two optimizers keep an {name!r} of it; let one step it")
        return found

    def _keeps_state_of_others(self, parameter: nn.Parameter) -> bool:
        groups = [(optimizer, group["params"]) for optimizer in self._holders for group in optimizer.param_groups]
        return any(
            isinstance(value, Tensor) and value.dim() > 0
            for optimizer, mates in groups
            if any(mate is parameter for mate in mates)
            for mate in mates
            for value in _state_of(optimizer, mate).values()
        )

    def local_values(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        values = parameter.detach()
        if not isinstance(values, DTensor):
            return values.view(-1), 0
        rank, world_size = rank_and_size(values.device_mesh.get_group())
        num_rows = values.shape[0]
        return values.to_local().view(-1), rank * chunk_numel(num_rows, world_size) * (values.numel() // num_rows)


def reshard(model: nn.Module) -> None:
    """Frees the root's weights that FSDP2 leaves gathered after a forward without backward. They are copies, which no optimizer
    steps and no write reaches. Local.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_placement(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that this access can't write: a DTensor over several mesh axes, or along another dimension.

    Raises:
        TopologyError: names it.
    """
    if isinstance(tensor, DTensor) and tensor.placements != (Shard(0),):
        raise TopologyError(f"{name} is placed as {tensor.placements}; shard it over one mesh axis, along dimension 0")


def _differs_between_ranks(tensor: Tensor) -> bool:
    """Returns whether a tensor that is whole on each rank differs between ranks in any bit. A collective."""
    if isinstance(tensor, DTensor) or not dist.is_initialized():
        return False
    digits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    digest = tensor.flatten().view(digits).sum(dtype=torch.int64)
    ends = torch.stack([digest, -digest])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends.sum() != 0)


def _state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    # By identity: a key of another type may hash alike, and tensors don't compare with it.
    return next((state for key, state in optimizer.state.items() if key is parameter), {})


def _parameter_ids(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    return {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != (Shard(0),):
        return tensor.full_tensor()
    # As values are; full_tensor() would hold them several times meanwhile.
    group, row_numel = tensor.device_mesh.get_group(), math.prod(tensor.shape[1:])
    chunk = padded(tensor.to_local().flatten(), chunk_numel(tensor.shape[0], dist.get_world_size(group)) * row_numel)
    return gather_equal(chunk, group)[: tensor.numel()].view(tensor.shape)


def _copy(tensor: Tensor, value: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(value)
        return
    tensor.to_local().copy_(rank_chunk(value, *rank_and_size(tensor.device_mesh.get_group())))
