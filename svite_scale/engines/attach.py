"""Attaching a topology engine to a training loop that isn't ours."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from svite_scale.engines.access import Optimizers, access_for
from svite_scale.engines.torch_access import TorchAccess, check_placement
from svite_scale.errors import OptionError, TopologyError
from svite_scale.options import refuse_unused
from svite_scale.sparsity.access import Annealed
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.units import UnitLayer
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.checks import check_stepped, refuse_attached
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule


def attach(
    model: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    schedule: UpdateSchedule | None = None,
    options: TopologyOptions | None = None,
    **when: Any,
) -> TopologyEngine:
    """Returns a topology engine for a sparse model that some engine has wrapped. A collective: all ranks call it.

    Call its ``step()`` right after each optimizer step, once per step (not per micro-batch), on all ranks: it moves weights,
    heads and neurons, and anneals token selectors. Layers are called what they are called in ``model``, without what engines'
    wrappers add to names.

    Args:
        model: the wrapped model: a plain module, DDP, an FSDP2 module, or a DeepSpeed engine. Or a submodule of one: then only
            the submodule's sparse layers move.
        optimizer: the torch optimizer that steps the model, a wrapper of it (Accelerate's, Lookahead, SAM), or a list or dict
            of several. A DeepSpeed engine needs none.
        schedule: when weights move, and how many.
        options: the method, its growth window, how grown weights start; see
            :class:`~svite_scale.sparsity.options.TopologyOptions`.
        **when: instead of ``schedule``, the fields of an :class:`~svite_scale.sparsity.topology.schedule.UpdateSchedule`:
            ``total_steps`` and ``update_every``, and of the others those that aren't at their defaults. Token selectors alone
            need no ``update_every``.

    Raises:
        TopologyError: nothing in the model is sparse; it has sparse layers under method ``dense``, or some that another engine
            moves already; what wraps it, or how that places parameters, isn't supported; or the optimizer steps other
            parameters, or keeps state that can't follow moving weights.
        OptionError: an option is unknown, out of range, or doesn't fit the others; it is a ValueError too.
    """
    layers = sparse_layers(model)
    if not layers and not any(isinstance(module, Annealed) for module in model.modules()):
        raise TopologyError("the model has no sparse layers; call svite_scale.sparsify(model, density=...) before wrapping it")
    if schedule is not None and when:
        raise OptionError("schedule", schedule, f"also says {', '.join(when)}", "give one of them")
    if not layers:
        when = {"update_every": 1, **when}
    schedule = schedule or UpdateSchedule(**when)
    if layers and options is not None and options.method == "dense":
        raise TopologyError("method dense has no sparse layers, but the model has; leave sparsify() out, or use method static")
    if layers and not any(isinstance(layer, UnitLayer) for layer in layers.values()):
        refuse_unused(schedule, "unit_drop_fraction", "isn't used, because the model has no packed heads or neurons")
    refuse_attached(layers)
    access = access_for(model, optimizer)
    if isinstance(access, TorchAccess):
        for name, layer in layers.items():
            for key, parameter in layer.named_parameters():
                check_placement(f"{name}.{key}", parameter)
    for name, layer in layers.items():
        check_stepped(name, layer, access, "build it after sparsify() and after the engine wrapped the model")
    group = dist.group.WORLD if dist.is_initialized() else None
    return TopologyEngine(model, access, schedule, options, group=group)
