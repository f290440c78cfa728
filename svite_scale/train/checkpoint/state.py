"""A run's tensors in logical coordinates.

Every tensor is flat, under its parameter's name in the unwrapped model, and each rank holds one chunk of it, whatever engine
held it. So what one engine saved on some number of ranks, another loads on another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from svite_scale.parallel.backend import Backend
from svite_scale.sparsity.sharding import rank_and_size, rank_chunk
from svite_scale.sparsity.topology import TopologyEngine
from svite_scale.train.ema import Ema


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
    ema: Ema | None
    group: dist.ProcessGroup

    @torch.no_grad()
    def collect(self) -> dict[str, DTensor]:
        """Copies of all tensors in CPU memory, of which each rank holds its chunks: ``model/NAME``, ``optimizer/MOMENT/NAME``,
        ``ema/NAME``, ``topology/STATISTIC/LAYER``.
        """
        mesh = DeviceMesh.from_group(self.group, "cpu")
        access = self.backend.access
        state: dict[str, DTensor] = {}
        for name, parameter in self.backend.model.named_parameters():
            state[f"model/{name}"] = self._chunked(access.read(parameter), mesh)
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    state[f"optimizer/{moment}/{name}"] = self._chunked(access.read_moment(parameter, moment), mesh)
                if self.ema:
                    state[f"ema/{name}"] = self._chunked(self.ema.read(parameter), mesh)
        for name, (chunk, numel) in self.topology.state().items():
            state[f"topology/{name}"] = _from_chunk(chunk, numel, mesh)
        return state

    @torch.no_grad()
    def write(self, state: dict[str, DTensor]) -> None:
        """Replaces all tensors by those of a state that has the names and sizes of :meth:`collect`."""
        access = self.backend.access
        device = next(self.backend.model.parameters()).device
        for name, parameter in self.backend.model.named_parameters():
            shape = access.read(parameter).shape

            def saved(key: str, shape: torch.Size = shape) -> Tensor:
                return state[key].full_tensor().to(device).view(shape)

            access.write(parameter, saved(f"model/{name}"))
            if parameter.requires_grad:
                for moment in access.moment_names(parameter):
                    access.write_moment(parameter, moment, saved(f"optimizer/{moment}/{name}"))
                if self.ema:
                    self.ema.write(parameter, saved(f"ema/{name}"))
        statistics = self.topology.state()
        self.topology.load_state({name: state[f"topology/{name}"].to_local().to(device) for name in statistics})

    def _chunked(self, full: Tensor, mesh: DeviceMesh) -> DTensor:
        flat = full.flatten()
        return _from_chunk(rank_chunk(flat, *rank_and_size(self.group)), flat.numel(), mesh)


def _from_chunk(chunk: Tensor, numel: int, mesh: DeviceMesh) -> DTensor:
    """A flat tensor of which each rank gives its chunk, which is copied to CPU memory."""
    copy = chunk.detach().to("cpu", copy=True)
    return DTensor.from_local(copy, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))
