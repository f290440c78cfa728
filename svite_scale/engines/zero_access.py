"""Reading and writing parameters that DeepSpeed ZeRO partitions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from svite_scale.engines.moments import elementwise
from svite_scale.engines.optimizers import steppers_in
from svite_scale.errors import TopologyError
from svite_scale.sparsity.sharding import gather_equal


def flat_moment_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns the names of a torch optimizer's elementwise state for ZeRO's flat partitions; empty before the first step."""
    for flat, state in optimizer.state.items():
        return list(elementwise(state, flat.shape))
    return []


class _ZeroAccess:
    """The part that is the same for all stages."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer`` is the torch optimizer that DeepSpeed steps.

        Raises:
            TopologyError: it wraps another.
        """
        self.optimizer = optimizer
        self.steppers = _unwrapped(optimizer)

    def reshard(self) -> None:
        """ZeRO's parameters stay in their place."""


class ReplicatedZeroAccess(_ZeroAccess):
    """A ParameterAccess for ZeRO-1 and 2: parameters are whole on every rank, master values and moments are partitioned."""

    def steps(self, parameter: nn.Parameter) -> bool:
        # DeepSpeed leaves the attribute on what it was given to step, on ranks that hold no part of it too.
        return hasattr(parameter, "_hp_mapping")

    def read(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.detach()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value)
        parameter.detach().copy_(value)

    def check_state(self, parameter: nn.Parameter, *, stepped: bool) -> None:
        """Its names are all that there is to check: DeepSpeed knows where it is."""

    def moment_names(self, parameter: nn.Parameter) -> list[str]:
        return flat_moment_names(self.optimizer)

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        self._link(parameter)
        return safe_get_full_optimizer_state(parameter, name)

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        self._link(parameter)
        safe_set_full_optimizer_state(parameter, value, name)

    def local_values(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        mapping = _mapping(parameter)
        if mapping is None:
            return parameter.detach().new_empty(0, dtype=torch.float32), 0
        return mapping.get_hp_fragment().detach(), mapping.lp_fragment_address.start

    def _link(self, parameter: nn.Parameter) -> None:
        """Makes DeepSpeed find the parameter's moments.

        It looks for all groups' moments after the first group's first step, when the other groups don't have any yet, and
        doesn't look again.
        """
        mapping = _mapping(parameter)
        if mapping is None:
            return
        (flat,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
        if flat in self.optimizer.state:
            lazy_init_hp_params_optimizer_state([parameter], flat, self.optimizer.state)


class PartitionedZeroAccess(_ZeroAccess):
    """A ParameterAccess for ZeRO-3: each rank holds one flat slice of each parameter, the last ones padded.

    DeepSpeed's own setters of full values fail where a parameter's size isn't a multiple of the world size, so this reads and
    writes the rank's own slice.
    """

    def steps(self, parameter: nn.Parameter) -> bool:
        try:
            return safe_get_local_fp32_param(parameter) is not None
        except KeyError:
            # It wasn't trainable when DeepSpeed wrapped the model.
            return False

    def read(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            return _gather(safe_get_local_fp32_param(parameter), parameter)
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, _slice(value, safe_get_local_fp32_param(parameter)))
        # The copy that forward gathers doesn't follow the master values by itself.
        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.detach().copy_(value)

    def check_state(self, parameter: nn.Parameter, *, stepped: bool) -> None:
        """Its names are all that there is to check: DeepSpeed knows where it is."""

    def moment_names(self, parameter: nn.Parameter) -> list[str]:
        return flat_moment_names(self.optimizer)

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        return _gather(safe_get_local_optimizer_state(parameter, name), parameter)

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        local = safe_get_local_optimizer_state(parameter, name)
        safe_set_local_optimizer_state(parameter, _slice(value, local), name)

    def local_values(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        local = safe_get_local_fp32_param(parameter).detach()
        return local, dist.get_rank() * local.numel()


def _unwrapped(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    steppers = steppers_in(optimizer)
    if steppers != [optimizer]:
        names = ", ".join(type(inner).__name__ for inner in steppers)
        raise TopologyError(
            f"DeepSpeed finds no state of {names} within {type(optimizer).__name__}; initialize DeepSpeed with {names} alone"
        )
    return steppers


def _mapping(parameter: nn.Parameter) -> Any:
    """Returns where ZeRO-1 and 2 keep this rank's part of a parameter's master values; None if other ranks hold them all.

    DeepSpeed's functions of public name read it too, but give whole tensors, by a collective.
    """
    return parameter._hp_mapping  # type: ignore[attr-defined]


def _gather(local: Tensor, parameter: nn.Parameter) -> Tensor:
    """Returns the full tensor of a parameter whose slices all ranks hold. A collective."""
    # The slices are views of a flat tensor with a gradient, which a collective outside no_grad() can't take.
    group = dist.group.WORLD
    assert group is not None, "DeepSpeed has joined the process group"
    full = gather_equal(local.detach(), group)
    # ds_shape is what DeepSpeed leaves on a partitioned parameter, whose own shape is (0,).
    shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
    return full[: shape.numel()].view(shape)


def _slice(value: Tensor, local: Tensor) -> Tensor:
    """Returns this rank's slice of a full value, padded with zeros to the size of ``local``."""
    start = dist.get_rank() * local.numel()
    part = value.flatten()[start : start + local.numel()]
    return torch.nn.functional.pad(part, (0, local.numel() - part.numel()))
