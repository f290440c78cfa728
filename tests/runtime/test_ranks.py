"""Which process of the job this is, as each launcher says it; devices; the group of one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from svite_scale.errors import ConfigError
from svite_scale.runtime import ranks
from svite_scale.runtime.world import World
from tests.ranks import run_on_ranks

MASTER = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
SLURM_JOB = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
"""What a batch script sees before it runs ``srun``."""

ENVIRONMENTS: dict[str, tuple[dict[str, str], World]] = {
    "plain python": ({"HOME": "/root"}, World(0, 1, 0, 1)),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", **MASTER},
        World(5, 8, 1, 4),
    ),
    "torchrun of one": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, World(0, 1, 0, 1)),
    "deepspeed": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MASTER}, World(3, 4, 1, 2)),
    "srun": ({**SLURM_JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", **MASTER}, World(6, 8, 2, 1)),
    "srun with a number of tasks per node": (
        {**SLURM_JOB, "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "4", **MASTER},
        World(0, 8, 0, 4),
    ),
    "srun of one task": ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, World()),
    "torchrun under srun": (
        {
            **SLURM_JOB,
            "SLURM_STEP_ID": "0",
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "3",
            "LOCAL_WORLD_SIZE": "4",
            **MASTER,
        },
        World(3, 4, 3, 4),
    ),
    "plain python in a batch script": ({**SLURM_JOB, **MASTER}, World()),
}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_world_reads_the_environment_of_every_launcher(launcher: str) -> None:
    environment, expected = ENVIRONMENTS[launcher]
    world = World.from_environment(environment)
    assert world == expected
    assert world.is_main == (expected.rank == 0)


def test_world_reads_the_own_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENTS["torchrun"][0].items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4)


TORCHRUN = ENVIRONMENTS["torchrun"][0]
BROKEN: dict[str, tuple[dict[str, str], str, object]] = {
    "rank alone": ({"RANK": "0"}, "WORLD_SIZE", None),
    "no local rank": ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, "LOCAL_RANK", None),
    "rank is a name": ({**TORCHRUN, "RANK": "first"}, "RANK", "first"),
    "negative rank": ({**TORCHRUN, "RANK": "-1"}, "RANK", "-1"),
    "empty size": ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE", ""),
    "a step without its size": ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "WORLD_SIZE", None),
    "srun without a master": ({**SLURM_JOB, "SLURM_STEP_ID": "0"}, "MASTER_ADDR", None),
    "local size is a name": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE", "all"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_world_names_the_variable_when_the_environment_is_incomplete(mistake: str) -> None:
    environment, field, value = BROKEN[mistake]
    with pytest.raises(ConfigError) as refusal:
        World.from_environment(environment)
    assert (refusal.value.field, refusal.value.value) == (field, value)
    assert "\n" not in str(refusal.value)


def test_local_device_is_the_ranks_gpu_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks.local_device(World(3, 4, 3, 4)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.local_device(World(3, 4, 1, 2)) == torch.device("cuda", 1)
    # Also on the main rank, which prints: the one without a GPU may be another.
    for world in (World(2, 3, 2, 3), World(0, 3, 0, 3)):
        with pytest.raises(ConfigError, match=r"^LOCAL_WORLD_SIZE = 3: .* \(2\); start fewer ranks on it$"):
            ranks.local_device(world)


def test_a_world_of_one_joins_and_leaves_a_group_of_one() -> None:
    """In a process of its own, for a process group is global."""
    script = (
        "import torch, torch.distributed as dist\n"
        "from svite_scale.runtime import ranks\n"
        "ranks.stop()\n"
        "ranks.start(ranks.World(), torch.device('cpu'))\n"
        "total = torch.ones(3)\n"
        "dist.all_reduce(total)\n"
        "print(dist.get_world_size(), total.sum().item())\n"
        "ranks.stop()\n"
        "print(dist.is_initialized(), torch.cuda.is_initialized())\n"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    answer = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["1", "3.0", "False", "False"]


def environment_world() -> tuple[World, int, int]:
    return World.from_environment(), dist.get_rank(), dist.get_world_size()


def test_world_matches_the_process_group_on_real_ranks() -> None:
    for rank, (world, group_rank, group_size) in enumerate(run_on_ranks(2, environment_world)):
        assert world == World(rank, 2, rank, 2)
        assert (group_rank, group_size) == (rank, 2)
