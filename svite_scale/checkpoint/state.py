"""A run's tensors in logical coordinates.

Every tensor is flat, under its parameter's name in the unwrapped model. Of a large one each rank holds a chunk; a small one is
whole, and one rank saves it. So whatever engine held them leaves no trace, and what one engine saved on some number of ranks,
another loads on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from svite_scale.engines.backend import Backend
from svite_scale.sparsity.sharding import gather_chunks, rank_and_size, rank_chunk
from svite_scale.sparsity.topology.engine import TopologyEngine

MOMENTS = "optimizer/"
"""What the names of moments begin with."""

STATISTICS = ("history", "recently_grown", "growth")
"""Tensors of a topology's ``state_dict()``, by layer each."""

SMALL_NUMEL = 2**16
"""Elements up to which a tensor isn't cut: each piece in a file has 1.8 kB of framing, which would soon outweigh it."""


class WeightAverage(Protocol):
    """An average of the weights that is saved beside them, as :class:`~svite_scale.train.ema.Ema` is."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Returns the full average of one parameter, fp32, shaped like it, on every rank. A collective."""

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Replaces what :meth:`read` returned."""


@dataclass(frozen=True)
class RunTensors:
    """The tensors of a run. All methods are collectives.

    Attributes:
        backend: holds values, masks and moments.
        topology: holds the statistics.
        ema: holds the average of the values; None where there is none.
        group: the ranks, on gloo.
    """

    backend: Backend
    topology: TopologyEngine
    ema: WeightAverage | None
    group: dist.ProcessGroup

    def to_save(self) -> dict[str, Tensor]:
        """Copies, in CPU memory, of what this rank saves: ``model/NAME``, ``optimizer/MOMENT/NAME``, ``ema/NAME``,
        ``topology/STATISTIC/LAYER``. Small tensors are dealt out to the ranks.
        """
        rank, world_size = rank_and_size(self.group)
        return self._copies(lambda number: number % world_size == rank, self.topology.counters())

    def to_load(self, counters: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same with all small tensors on every rank, to be loaded into; statistics of a topology with these counters."""
        return self._copies(lambda number: True, counters)

    @torch.no_grad()
    def write(self, state: dict[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Replaces all tensors by those of a state that has the names and sizes of :meth:`to_load`, and the topology's
        counters.
        """
        access = self.backend.access
        device = next(self.backend.model.parameters()).device
        for name, parameter in self.backend.model.named_parameters():
            shape = access.read(parameter).shape

            def saved(key: str, shape: torch.Size = shape) -> Tensor:
                tensor = state[key]
                return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(device).view(shape)

            access.write(parameter, saved(f"model/{name}"))
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    access.write_moment(parameter, moment, saved(f"{MOMENTS}{moment}/{name}"))
                if self.ema:
                    self.ema.write(parameter, saved(f"ema/{name}"))
        topology: dict[str, Any] = {kind: {} for kind in STATISTICS} | {"counters": counters}
        for key, tensor in state.items():
            section, _, rest = key.partition("/")
            if section == "topology":
                kind, _, name = rest.partition("/")
                topology[kind][name] = tensor
        self.topology.load_state_dict(topology)

    @torch.no_grad()
    def _copies(self, holds: Callable[[int], bool], counters: Mapping[str, Any]) -> dict[str, Tensor]:
        """``holds`` tells of a small tensor's number whether it is wanted here."""
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
        """Each tensor's name, all of a small or the rank's chunk of a large one, and its elements; gathered one at a time."""
        access = self.backend.access
        rank, world_size = rank_and_size(self.group)

        def part(name: str, full: Tensor) -> tuple[str, Tensor, int]:
            flat = full.flatten()
            return name, flat if flat.numel() <= SMALL_NUMEL else rank_chunk(flat, rank, world_size), flat.numel()

        for name, parameter in self.backend.model.named_parameters():
            yield part(f"model/{name}", access.read(parameter))
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    yield part(f"{MOMENTS}{moment}/{name}", access.read_moment(parameter, moment))
                if self.ema:
                    yield part(f"ema/{name}", self.ema.read(parameter))
        statistics = self.topology.state_dict()
        for kind in STATISTICS:
            for name, tensor in statistics[kind].items():
                # Nothing but zeros.
                if kind == "growth" and (not counters["recorded_steps"] or name in counters["frozen"]):
                    continue
                chunk, numel = tensor.to_local() if isinstance(tensor, DTensor) else tensor, tensor.numel()
                small = numel <= SMALL_NUMEL
                yield f"topology/{kind}/{name}", gather_chunks(chunk.cpu(), numel, self.group) if small else chunk, numel
