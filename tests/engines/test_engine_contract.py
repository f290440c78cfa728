"""What this package takes from the engines beyond their documented interfaces. A failure here names what an upgrade broke."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from svite_scale import attach
from svite_scale.engines.access import access_for
from svite_scale.engines.torch_access import TorchAccess
from svite_scale.errors import OptionError, TopologyError
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.packing import sparsify
from svite_scale.sparsity.sharding import rank_chunk
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from tests.engines.engines import adamw, build_backend, small_vit
from tests.ranks import run_on_ranks
from tests.sparsity.packing import packed_layers


class Sizes(nn.Module):
    """Frozen bytes and floats of 1 to 13 elements, of which most leave some rank without any."""

    def __init__(self) -> None:
        super().__init__()
        for size in range(1, 14):
            self.register_parameter(f"floats{size}", nn.Parameter(torch.arange(float(size))))
            self.register_parameter(f"bytes{size}", nn.Parameter(torch.arange(size, dtype=torch.uint8), requires_grad=False))


def check_fsdp2() -> None:
    """FSDP2 shards along dimension 0 and cuts as torch.chunk does, bytes too."""
    model = build_backend("fsdp2", Sizes(), adamw).model
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.placements == (Shard(0),), name
        full = torch.arange(parameter.numel(), dtype=parameter.dtype)
        assert torch.equal(parameter.to_local(), rank_chunk(full, dist.get_rank(), dist.get_world_size())), name


def check_deepspeed() -> None:
    """The engine's class is DeepSpeed's, and names its stage and the optimizer it was given."""
    for stage in (1, 2, 3):
        backend: Any = build_backend(f"zero{stage}", small_vit(), adamw)
        assert type(backend.wrapped).__module__.startswith("deepspeed.")
        assert backend.wrapped.zero_optimization_stage() == stage
        assert backend.wrapped.basic_optimizer is backend.optimizer
        expected = "PartitionedZeroAccess" if stage == 3 else "ReplicatedZeroAccess"
        assert type(access_for(backend.wrapped, None)).__name__ == expected


def check_zero3_shapes() -> None:
    """A partitioned parameter hides its shape and keeps it in ds_shape; a packed layer knows its own."""
    model = build_backend("zero3", small_vit(), adamw).model
    whole = dict(small_vit().named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.ds_shape == whole[name].shape, name  # type: ignore[attr-defined]
        assert parameter.shape == (0,), name
    for name, layer in packed_layers(model).items():
        assert layer.num_active == whole[f"{name}.values"].numel()


class StageZero:
    """Looks like a DeepSpeed engine without ZeRO."""

    __module__ = "deepspeed.runtime.engine"

    def zero_optimization_stage(self) -> int:
        return 0


def check_stage_0_is_refused() -> None:
    with pytest.raises(TopologyError, match="runs ZeRO stage 0; use stage 1, 2 or 3"):
        access_for(StageZero(), None)


def check_all() -> None:
    """Runs on every rank."""
    check_fsdp2()
    check_deepspeed()
    check_zero3_shapes()
    check_stage_0_is_refused()


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_engines_are_as_this_package_takes_them(world_size: int) -> None:
    run_on_ranks(world_size, check_all)


def packed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsify(model, 0.5)
    return model


def test_attach_needs_packed_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TopologyError, match=r"no sparse layers; call svite_scale\.sparsify"):
        attach(model, adamw(model), total_steps=10, update_every=2)


def test_attach_needs_an_optimizer() -> None:
    with pytest.raises(TopologyError, match=r"Sequential needs its optimizer too: attach\(model, optimizer"):
        attach(packed(), total_steps=10, update_every=2)


def test_attach_passes_its_options_on() -> None:
    model = packed()
    topology = attach(
        model,
        adamw(model),
        total_steps=100,
        update_every=7,
        start_step=3,
        stop_fraction=0.5,
        drop_fraction=0.4,
        final_drop_fraction=0.1,
        drop_schedule="linear",
        options=TopologyOptions(grown_moments="zero"),
    )
    schedule = topology.schedule
    assert (schedule.update_every, schedule.stop_step, schedule.drop_fraction, schedule.final_drop_fraction) == (
        7,
        50,
        0.4,
        0.1,
    )
    assert (schedule.start_step, schedule.drop_schedule) == (3, "linear")
    assert topology.options.grown_moments == "zero"
    assert isinstance(topology.access, TorchAccess)
    assert topology.growth.group is None


def test_attach_moves_weights_in_a_plain_loop() -> None:
    model = packed()
    optimizer = adamw(model)
    topology = attach(model, optimizer, total_steps=10, update_every=2)
    updated = []
    for step in range(10):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if topology.step() is not None:
            updated.append(step + 1)
    assert updated == [2, 4, 6, 8]


def buffers_in_shm() -> list[str]:
    """Of DeepSpeed's, on these ranks."""
    build_backend("zero1", small_vit(), adamw)
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]


def test_deepspeed_makes_no_buffers_for_inference_in_shm() -> None:
    assert run_on_ranks(2, buffers_in_shm) == [[], []]


def test_attach_takes_a_schedule_in_place_of_its_fields() -> None:
    model = packed()
    schedule = UpdateSchedule(total_steps=100, update_every=7)
    assert attach(model, adamw(model), schedule=schedule).schedule is schedule
    model = packed()
    with pytest.raises(OptionError, match=r"^schedule = UpdateSchedule\(.*\): also says update_every; give one of them$"):
        attach(model, adamw(model), schedule=schedule, update_every=7)
    with pytest.raises(OptionError, match=r"^update_evry = 7: is no option of UpdateSchedule; the nearest is update_every$"):
        attach(model, adamw(model), total_steps=100, update_evry=7)
    with pytest.raises(OptionError, match=r"^unit_drop_fraction = 0.5: isn't used, because the model has no packed heads or"):
        attach(model, adamw(model), total_steps=100, update_every=7, unit_drop_fraction=0.5)
