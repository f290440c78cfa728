"""The parts of a run that a checkpoint saves, and their tensors in logical coordinates.

Every tensor is flat, under its parameter's name in the unwrapped model. Each rank saves a chunk of a large tensor; one rank
saves a small tensor whole. So a checkpoint has no trace of the engine and the number of ranks, and any other can load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from svite_scale.engines.backend import Backend
from svite_scale.sparsity.sharding import gather_chunks, rank_and_size, rank_chunk
from svite_scale.sparsity.topology.engine import TopologyEngine

MOMENTS = "optimizer/"
"""Prefix of the names of moments."""

STATISTICS = ("history", "recently_grown", "growth")
"""The tensors of a topology's ``state_dict()``, each by layer."""

SMALL_NUMEL = 2**16
"""Number of elements up to which a tensor isn't cut. Each piece in a file has 1.8 kB of framing, too much for a small piece."""


class WeightAverage(Protocol):
    """An average of the weights that is saved beside them, as :class:`~svite_scale.train.ema.Ema` is."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Returns the full average of one parameter, fp32, shaped like it, on every rank. A collective."""

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Replaces what :meth:`read` returned."""


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that a checkpoint saves, besides the config.

    Attributes:
        backend: the model and the optimizer.
        topology: the topology engine.
        ema: the average of the weights; None if there is none.
        stateful: counters that are equal on all ranks, by name. Their state is plain numbers, for JSON.
        samples: identity of the training samples, for JSON. A resumed run must have the same. None identifies nothing.
    """

    backend: Backend
    topology: TopologyEngine
    ema: WeightAverage | None = None
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    samples: Mapping[str, object] | None = None


@dataclass(frozen=True)
class RunTensors:
    """The tensors of a run. All methods are collectives.

    Attributes:
        run: holds the tensors.
        group: the ranks, on gloo.
    """

    run: RunParts
    group: dist.ProcessGroup

    def to_save(self) -> dict[str, Tensor]:
        """Copies what this rank saves to CPU memory: ``model/NAME``, ``optimizer/MOMENT/NAME``, ``ema/NAME``,
        ``topology/STATISTIC/LAYER``. Ranks take turns with small tensors.
        """
        rank, world_size = rank_and_size(self.group)
        return self._copies(lambda number: number % world_size == rank, self.run.topology.counters())

    def to_load(self, counters: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the same tensors to load into, with all small ones on every rank, for a topology with these counters."""
        return self._copies(lambda number: True, counters)

    @torch.no_grad()
    def write(self, state: dict[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Replaces the run's tensors by those of a state, which has the names and sizes of :meth:`to_load`, and the topology's
        counters.
        """
        access = self.run.backend.access
        device = next(self.run.backend.model.parameters()).device
        for name, parameter in self.run.backend.model.named_parameters():
            shape = access.read(parameter).shape

            def saved(key: str, shape: torch.Size = shape) -> Tensor:
                tensor = state[key]
                return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(device).view(shape)

            access.write(parameter, saved(f"model/{name}"))
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    access.write_moment(parameter, moment, saved(f"{MOMENTS}{moment}/{name}"))
                if self.run.ema:
                    self.run.ema.write(parameter, saved(f"ema/{name}"))
        topology: dict[str, Any] = {kind: {} for kind in STATISTICS} | {"counters": counters}
        for key, tensor in state.items():
            section, _, rest = key.partition("/")
            if section == "topology":
                kind, _, name = rest.partition("/")
                topology[kind][name] = tensor
        self.run.topology.load_state_dict(topology)

    @torch.no_grad()
    def _copies(self, holds: Callable[[int], bool], counters: Mapping[str, Any]) -> dict[str, Tensor]:
        """``holds`` returns whether this rank gets a small tensor, given its number."""
        mesh = DeviceMesh.from_group(self.group, "cpu")
        state: dict[str, Tensor] = {}
        num_small = 0
        for name, part, numel in self._parts(counters):
            if numel > SMALL_NUMEL:
                chunk = part.to("cpu", copy=True)
                shape = torch.Size([numel])
                state[name] = DTensor.from_local(chunk, mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))
            else:
                if holds(num_small):
                    state[name] = part.to("cpu", copy=True)
                num_small += 1
        return state

    def _parts(self, counters: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, int]]:
        """Yields the name of each tensor, this rank's part of it (a small tensor is whole), and the whole tensor's number of
        elements. One parameter is gathered at a time."""
        access = self.run.backend.access
        rank, world_size = rank_and_size(self.group)

        def part(name: str, full: Tensor) -> tuple[str, Tensor, int]:
            flat = full.flatten()
            return name, flat if flat.numel() <= SMALL_NUMEL else rank_chunk(flat, rank, world_size), flat.numel()

        for name, parameter in self.run.backend.model.named_parameters():
            yield part(f"model/{name}", access.read(parameter))
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    yield part(f"{MOMENTS}{moment}/{name}", access.read_moment(parameter, moment))
                if self.run.ema:
                    yield part(f"ema/{name}", self.run.ema.read(parameter))
        statistics = self.run.topology.state_dict()
        for kind in STATISTICS:
            for name, tensor in statistics[kind].items():
                # Nothing but zeros.
                if kind == "growth" and (not counters["recorded_steps"] or name in counters["frozen"]):
                    continue
                chunk, numel = tensor.to_local() if isinstance(tensor, DTensor) else tensor, tensor.numel()
                small = numel <= SMALL_NUMEL
                yield f"topology/{kind}/{name}", gather_chunks(chunk.cpu(), numel, self.group) if small else chunk, numel
