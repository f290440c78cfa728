"""Bytes that training holds and sends, packed against dense, on every backend.

    python benchmarks/bytes.py [--model deit_tiny_patch16_224] [--density 0.3] [--block 1 1] [--world-sizes 1 2 4]

Held bytes are the storages of the engine's own tensors between two steps, on rank 0. Gradients are those of the parameters, and
whatever else is alive before the optimizer's step but not after it. Buffers are what else the engine holds, to use it again.
Sent bytes are what the kernel counted on the ranks' own TCP connections in a step, divided by the number of ranks.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_local_grad
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' ranks, too

from benchmarks.machine import describe_machine
from svite_scale.config.schema import SparsityConfig
from svite_scale.engines.backend import Backend, EngineOptions
from svite_scale.engines.build import build_backend
from svite_scale.engines.options import ParallelConfig
from svite_scale.models.dense import blocks
from svite_scale.models.options import ModelConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.train.optimizer import build_optimizer
from svite_scale.train.options import OptimizerConfig
from tests.ranks import close_all, run_on_ranks

BACKENDS = {
    "single": ParallelConfig(backend="single"),
    "ddp": ParallelConfig(backend="ddp"),
    "fsdp2": ParallelConfig(backend="fsdp2"),
    "zero1": ParallelConfig(backend="deepspeed", zero_stage=1),
    "zero2": ParallelConfig(backend="deepspeed", zero_stage=2),
    "zero3": ParallelConfig(backend="deepspeed", zero_stage=3),
}
STATE = ("values", "master values", "mask", "gradients", "moments", "statistics")
KINDS = (*STATE, "buffers")
BATCH_SIZE, WARMUP_STEPS = 2, 2
BYTES_RECEIVED = 128
"""Their offset in Linux's ``struct tcp_info``."""


def measure(backend_name: str, model_name: str, sparsity: SparsityConfig, precision: str) -> dict[str, float]:
    """Returns the bytes by kind on this rank, and the bytes that an average rank sends in a step. A collective."""
    earlier = storages(live_tensors()).keys()
    model, _ = build_sparse(ModelConfig(name=model_name), sparsity, seed=0)
    options = EngineOptions(
        device=torch.device("cpu"), wrap_units=blocks(model), micro_batch_size=BATCH_SIZE, bf16=precision == "bf16"
    )
    backend = build_backend(BACKENDS[backend_name], model, lambda module: build_optimizer(module, OptimizerConfig()), options)
    schedule = UpdateSchedule(total_steps=1000, update_every=1000)
    topology = TopologyEngine(model, backend.access, schedule, group=dist.group.WORLD)
    for _ in range(WARMUP_STEPS):
        one_step(backend, topology)
    sent = sent_bytes(backend, topology)
    return held_bytes(backend, topology, earlier) | {"wire": sent / dist.get_world_size()}


def sent_bytes(backend: Backend, topology: TopologyEngine) -> int:
    """Returns the bytes that all ranks send in a step. A collective."""
    dist.barrier()
    before = received_bytes()
    one_step(backend, topology)
    dist.barrier()
    received = torch.tensor(received_bytes() - before)
    dist.all_reduce(received)
    return int(received)


def one_step(backend: Backend, topology: TopologyEngine) -> None:
    backward(backend)
    backend.step()
    topology.step()


def backward(backend: Backend) -> None:
    images, labels = torch.randn(BATCH_SIZE, 3, 224, 224), torch.zeros(BATCH_SIZE, dtype=torch.int64)
    backend.backward(F.cross_entropy(backend.forward(images).float(), labels))


def gradient_of_a_step(backend: Backend, topology: TopologyEngine) -> dict[int, int]:
    """Does a step, and returns the storages of its gradient: sizes by address."""
    backward(backend)
    before, gradients = storages(live_tensors()), storages(gradients_of(backend))
    backend.step()
    topology.step()
    after = storages(live_tensors())
    return gradients | {address: size for address, size in before.items() if address not in after}


def gradients_of(backend: Backend) -> list[Tensor]:
    """Returns this rank's part of the gradients of all parameters for which the engine shows it."""
    trainable = [parameter for parameter in backend.model.parameters() if parameter.requires_grad]
    if hasattr(trainable[0], "ds_tensor"):
        return [safe_get_local_grad(parameter) for parameter in trainable]
    return [stored(parameter.grad) for parameter in trainable if parameter.grad is not None]


def held_bytes(backend: Backend, topology: TopologyEngine, earlier: Collection[int]) -> dict[str, float]:
    """Returns the bytes of this rank's tensors by kind. Each storage counts once, under the first kind that it serves.

    Args:
        backend: has done some steps.
        topology: its topology engine.
        earlier: addresses of storages that were there before the backend.
    """
    gradients = gradient_of_a_step(backend, topology)
    parameters = list(backend.model.parameters())
    optimizer_state, state = backend.optimizer.state, topology.state_dict()
    owners: list[tuple[str, Iterable[Tensor]]] = [
        ("mask", [stored(p) for p in parameters if not p.requires_grad]),
        ("values", [stored(p) for p in parameters if p.requires_grad]),
        ("master values", [stored(flat) for flat in optimizer_state]),
        ("moments", [stored(v) for state in optimizer_state.values() for v in state.values() if isinstance(v, Tensor)]),
        ("statistics", [stored(t) for t in (*state["history"].values(), *state["recently_grown"].values())]),
        ("buffers", live_tensors()),
    ]
    held: dict[str, float] = {"gradients": sum(gradients.values())}
    seen = {*earlier, *gradients}
    for kind, tensors in owners:
        sizes = storages(tensors)
        held[kind] = sum(size for address, size in sizes.items() if address not in seen)
        seen |= sizes.keys()
    return held


def stored(tensor: Tensor) -> Tensor:
    """Returns the tensor that holds this rank's part of a parameter."""
    tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3 keeps it there
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def live_tensors() -> list[Tensor]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors = [stored(tensor) for tensor in tensors] + [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return [stored(tensor) for tensor in tensors if not tensor.is_meta]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns the size of each distinct storage by its address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def received_bytes() -> int:
    """Returns the bytes that this process's open TCP connections have received. The loopback interface counts all processes."""
    received = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and os.readlink(link).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_RECEIVED + 8)
                    received += struct.unpack_from("Q", info, BYTES_RECEIVED)[0]
    return received


def print_table(rows: list[tuple[str, int, dict[str, float], dict[str, float]]]) -> None:
    """Prints a row per backend, world size and kind: packed MB, dense MB, ratio."""
    print(f"\n{'backend':8} {'ranks':>5}  {'kind':14} {'packed MB':>10} {'dense MB':>10} {'ratio':>7}")
    for backend, world_size, packed, dense in rows:
        packed, dense = ({**held, "state": sum(held[kind] for kind in STATE)} for held in (packed, dense))
        for kind in (*KINDS, "state", "wire"):
            ratio = f"{packed[kind] / dense[kind]:7.3f}" if dense[kind] > 1e5 else "      -"
            print(f"{backend:8} {world_size:5}  {kind:14} {packed[kind] / 1e6:10.3f} {dense[kind] / 1e6:10.3f} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--block", type=int, nargs=2, default=[1, 1], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    arguments = parser.parse_args()
    print(describe_machine())
    sparse = SparsityConfig(density=arguments.density, block=tuple(arguments.block))
    print(f"{arguments.model}, density {sparse.density}, block {arguments.block}, {arguments.precision}")
    print(f"state = {' + '.join(STATE)}, of rank 0")
    rows = []
    for world_size in arguments.world_sizes:
        for backend in arguments.backends:
            if backend == "single" and world_size > 1:
                continue
            packed, dense = (
                run_on_ranks(world_size, measure, backend, arguments.model, sparsity, arguments.precision)[0]
                for sparsity in (sparse, SparsityConfig())
            )
            rows.append((backend, world_size, packed, dense))
    print_table(rows)
    close_all()


if __name__ == "__main__":
    main()
