"""This process among those of a job, whatever launcher started them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from svite_scale.errors import ConfigError

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""Names in a bare ``srun`` of the variables that ``torchrun``, ``deepspeed`` and ``accelerate launch`` set."""

LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Names of the number of ranks on this machine under ``torchrun``, ``deepspeed`` and ``srun``. Slurm sets its own only if the
job asks for a number of tasks per node."""


@dataclass(frozen=True)
class World:
    """This process among the processes of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes single files."""
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
