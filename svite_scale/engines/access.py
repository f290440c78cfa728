"""Choice of the parameter access for a wrapped model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from svite_scale.engines.torch_access import TorchAccess
from svite_scale.errors import TopologyError
from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.module_names import is_of_deepspeed

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[Any, torch.optim.Optimizer]


def access_for(model: Any, optimizer: Optimizers | None) -> ParameterAccess:
    """Returns the access to a wrapped model's parameters.

    Raises:
        TopologyError: a torch optimizer is needed and missing, or the DeepSpeed engine doesn't run ZeRO.
    """
    if is_of_deepspeed(model):
        return _zero_access(model)
    if optimizer is None:
        raise TopologyError(f"{type(model).__name__} needs its optimizer too: attach(model, optimizer, ...)")
    if type(optimizer).__module__.startswith("deepspeed.runtime"):
        raise TopologyError(f"{type(optimizer).__name__} belongs to a DeepSpeed engine; attach to that: attach(engine, ...)")
    return TorchAccess(model, optimizer)


def _zero_access(engine: Any) -> ParameterAccess:
    from svite_scale.engines.zero_access import PartitionedZeroAccess, ReplicatedZeroAccess

    stage = engine.zero_optimization_stage()
    if stage not in (1, 2, 3):
        raise TopologyError(f"the DeepSpeed engine runs ZeRO stage {stage}; use stage 1, 2 or 3")
    return (PartitionedZeroAccess if stage == 3 else ReplicatedZeroAccess)(engine.basic_optimizer)
