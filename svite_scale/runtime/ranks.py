"""Devices, and the process group that the ranks of a job form."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from svite_scale.errors import ConfigError
from svite_scale.runtime.world import World

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""gloo's default; NCCL's is 10 minutes, too short for ranks that wait while one rank builds DeepSpeed's ops."""


def local_device(world: World) -> torch.device:
    """Returns this rank's GPU, or the CPU on a machine without GPUs.

    Raises:
        ConfigError: this machine has more ranks than GPUs. Raised on all of its ranks, also on those with a GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = max(world.local_size, world.local_rank + 1), torch.cuda.device_count()
    if ranks > gpus:
        raise ConfigError(
            "LOCAL_WORLD_SIZE", ranks, f"is more than the GPUs of this machine ({gpus})", "start fewer ranks on it"
        )
    return torch.device("cuda", world.local_rank)


def start(world: World, device: torch.device, hang_timeout_s: float | None = None) -> dist.Store:
    """Joins the process group: NCCL for GPU tensors, gloo for CPU tensors. A collective.

    A world of one gets a group of one, so that all later code has one path.

    Args:
        world: this rank's.
        device: this rank's.
        hang_timeout_s: the watchdog's timeout, in seconds. Collectives get twice as long, so that the watchdog ends the job
            first: its error names the rank that hangs.

    Returns:
        The store that all ranks share.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world.local_size > 1:
        # A rank that has the machine for itself keeps the threads that torch or OMP_NUM_THREADS give it.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * (hang_timeout_s or 0)))
    store: dist.Store = dist.HashStore()
    if world.size > 1:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return store


def broadcast_from_main(value: bool) -> bool:
    """Returns the main rank's value on all ranks. A collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
