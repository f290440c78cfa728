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
"""What a bare ``srun`` calls the variables that ``torchrun``, ``deepspeed`` and ``accelerate launch`` set."""

LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Ranks on this machine as ``torchrun``, ``deepspeed`` and ``srun`` call them; the last is set only where a job asks for it."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""gloo's default; NCCL's is 10 minutes. A collective may also wait for one rank to build DeepSpeed's ops."""


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
        """Reads what the launcher said; a plain ``python`` is a world of one.

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


def device_of(world: World) -> torch.device:
    """The device of this rank: its GPU where there is one, else the CPU.

    Raises:
        ConfigError: more ranks than GPUs on this machine; on all of its ranks, also those with a GPU.
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
    """Joins the process group: NCCL for GPU tensors, gloo for CPU ones. All ranks call it.

    A world of one gets a group of one, so that everything after has one code path.

    Args:
        world: this rank's.
        device: this rank's.
        hang_timeout_s: seconds that somebody waits for a rank before they end the job; collectives then wait for longer, since
            their own errors name no rank.

    Returns:
        The store through which the ranks have met.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world.local_size > 1:
        # Alone, a process has the threads that torch or OMP_NUM_THREADS give it.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * (hang_timeout_s or 0)))
    store: dist.Store = dist.HashStore()
    if world.size > 1:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return store


def main_says(answer: bool) -> bool:
    """The main rank's answer, on all ranks; what each sees of a shared file system may differ. A collective."""
    answers = [answer]
    dist.broadcast_object_list(answers, src=0, device=torch.device("cpu"))
    return answers[0]


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
