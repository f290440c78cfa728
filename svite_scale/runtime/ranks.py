"""Ranks, devices and the process group, from whatever launcher started the process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from svite_scale.errors import ConfigError

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""Names in a bare ``srun`` of the variables that ``torchrun``, ``deepspeed`` and ``accelerate launch`` set."""

LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Names of the number of ranks on this machine under ``torchrun``, ``deepspeed`` and ``srun``. Slurm sets its own only if the
job asks for a number of tasks per node."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""gloo's default; NCCL's is 10 minutes, too short for ranks that wait while one rank builds DeepSpeed's ops."""


@dataclass(frozen=True)
class World:
    """This process among the processes of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints, logs and writes single files."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Reads the launcher's environment variables. A plain ``python`` is a world of one.

        Raises:
            ConfigError: some of the variables are set and others are missing, or one isn't a number.
        """
        found = {name: environment.get(name, environment.get(slurm)) for name, slurm in SLURM_NAMES.items()}
        local_name = next((name for name in LOCAL_SIZE_NAMES if name in environment), None)
        if environment.get("RANK") is None and environment.get("SLURM_STEP_ID") is None:
            return cls()
        local_size = "1" if local_name is None else environment[local_name]
        for name, value in (*found.items(), (local_name or "LOCAL_WORLD_SIZE", local_size)):
            if value is None or not value.isdecimal():
                raise ConfigError(
                    name, value, "is not set to a rank or size by the launcher", "start with torchrun, deepspeed or srun"
                )
        rank, size, local_rank = (int(found[name] or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if size > 1 and not environment.get("MASTER_ADDR"):
            raise ConfigError("MASTER_ADDR", None, "is not set", "export MASTER_ADDR and MASTER_PORT in the batch script")
        return cls(rank, size, local_rank, int(local_size))


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
