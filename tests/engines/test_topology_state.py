"""The topology's own state, saved and loaded by ``torch.distributed.checkpoint``, on any engine and number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

import svite_scale
from svite_scale.engines.backend import Backend
from svite_scale.errors import TopologyError
from svite_scale.sparsity.topology.engine import TopologyEngine
from tests.engines.engines import build_backend
from tests.ranks import run_on_ranks

OPTIONS = svite_scale.TopologyOptions(grow_window=3, grown_warmup_steps=3)
STOP = 7
"""The update came after step 4, and steps 6 to 8 are the next growth window."""

Result = dict[str, list[float]]


def built(kind: str) -> tuple[Backend, TopologyEngine]:
    """A model of which no world size divides anything, on an engine. A collective."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 19), nn.GELU(), nn.Linear(19, 5))
    svite_scale.sparsify(model, 0.37)
    backend = build_backend(kind, model, sgd, micro_batch_size=12 // dist.get_world_size())
    engine = backend.wrapped if kind.startswith("zero") else backend.model
    optimizer = None if kind.startswith("zero") else backend.optimizer
    return backend, svite_scale.attach(engine, optimizer, total_steps=100, update_every=4, options=OPTIONS)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(backend: Backend, topology: TopologyEngine, first: int, last: int) -> None:
    """Trains on each rank's part of 12 samples a step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(first, last + 1):
        x = torch.randn(12, 11, generator=torch.Generator().manual_seed(step))[rank::world_size]
        labels = (torch.arange(12) % 5)[rank::world_size]
        backend.backward(nn.functional.cross_entropy(backend.forward(x), labels))
        topology.step(applied=backend.step().applied)


@torch.no_grad()
def result_of(backend: Backend, topology: TopologyEngine) -> Result:
    """All parameters and the topology's statistics, in full. A collective."""
    access, growth = backend.access, topology.growth
    result = {name: access.read(parameter).flatten().tolist() for name, parameter in backend.model.named_parameters()}
    kinds = topology.state_dict()
    for kind in ("history", "recently_grown"):
        for name, tensor in kinds[kind].items():
            result[f"{kind}/{name}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
    if growth.recorded_steps:
        result |= {f"growth/{name}": growth.gather(layer).tolist() for name, layer in topology.layers.items()}
    return result


def saved(kind: str, path: Path) -> Result:
    """The statistics at the save. A collective."""
    backend, topology = built(kind)
    train(backend, topology, 1, STOP)
    dcp.save({"topology": topology}, checkpoint_id=path)
    return result_of(backend, topology)


def loaded(kind: str, path: Path) -> Result:
    backend, topology = built(kind)
    dcp.load({"topology": topology}, checkpoint_id=path)
    assert (topology.steps, topology.last_update, topology.growth.recorded_steps) == (STOP, 4, 2)
    return result_of(backend, topology)


def assert_same(found: Result, expected: Result, prefix: str) -> None:
    assert found.keys() == expected.keys()
    for name in (name for name in expected if name.startswith(prefix)):
        if name.endswith(".mask") or name.startswith(("history/", "recently_grown/")):
            assert found[name] == expected[name], name
        else:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero1", "zero3"])
def test_a_topology_state_loads_on_other_ranks_and_engines(tmp_path: Path, kind: str) -> None:
    (expected, *_) = run_on_ranks(2, saved, kind, tmp_path)
    assert any(name.startswith("growth/") for name in expected)
    for world_size, other in ((1, "single"), (3, "fsdp2"), (2, "zero3")):
        for found in run_on_ranks(world_size, loaded, other, tmp_path):
            for part in ("history/", "recently_grown/", "growth/"):
                assert_same(found, expected, part)


def packed() -> tuple[nn.Module, TopologyEngine]:
    """Without process group."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    svite_scale.sparsify(model, 0.5)
    return model, svite_scale.attach(model, sgd(model), total_steps=100, update_every=4, options=OPTIONS)


def test_the_state_of_one_process_without_a_group_is_plain_tensors_and_numbers(tmp_path: Path) -> None:
    model, topology = packed()
    assert isinstance(topology, Stateful)
    for _ in range(STOP):
        model(torch.randn(3, 6)).square().sum().backward()
        topology.step()
    dcp.save({"topology": topology}, checkpoint_id=tmp_path, no_dist=True)
    _, other = packed()
    dcp.load({"topology": other}, checkpoint_id=tmp_path, no_dist=True)
    expected, found = topology.state_dict(), other.state_dict()
    assert found["counters"] == expected["counters"]
    assert expected["counters"]["recorded_steps"] == 2
    for kind in ("history", "recently_grown", "growth"):
        for name, tensor in expected[kind].items():
            assert type(tensor) is torch.Tensor
            assert torch.equal(found[kind][name], tensor), (kind, name)
            assert tensor.any() or kind == "recently_grown", (kind, name)


def test_a_window_of_one_step_saves_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    svite_scale.sparsify(model, 0.5)
    topology = svite_scale.attach(model, sgd(model), total_steps=100, update_every=2)
    assert topology.state_dict()["growth"] == {}


def test_a_state_of_another_model_is_refused_by_the_name_of_a_layer() -> None:
    _, topology = packed()
    other = nn.Sequential(nn.Linear(6, 60))
    svite_scale.sparsify(other, 0.5)
    state = svite_scale.attach(other, sgd(other), total_steps=100, update_every=4, options=OPTIONS).state_dict()
    with pytest.raises(
        TopologyError, match=r"history of 0 is \(45,\) in the saved topology and \(5,\) here; load it with the same model"
    ):
        topology.load_state_dict(state)
    state = packed()[1].state_dict()
    state["counters"]["recorded_steps"] = 1
    state["growth"] = {}
    with pytest.raises(TopologyError, match=r"growth of 0 is not there in the saved topology and \(36,\) here"):
        topology.load_state_dict(state)
