"""The average of packed weights is timm's of a dense-masked model, on every engine, through topology updates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from svite_scale.config.schema import Config
from svite_scale.engines.backend import Backend
from svite_scale.sparsity import bits
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.train.ema import Ema
from tests.engines.engines import adamw, build_backend, small_vit, units_vit
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, assert_same_state, loaded, metrics_of, resumed_run, run
from tests.sparsity.packing import packed_layers
from tests.tiny import tiny_config

STEPS, UPDATE_EVERY, BATCH, DECAY = 7, 3, 4, 0.8


def images(step: int) -> Tensor:
    return torch.randn(BATCH, 1, 14, 14, generator=torch.Generator().manual_seed(step))


def train_step(backend: Backend, inputs: Tensor) -> None:
    backend.backward(nn.functional.cross_entropy(backend.forward(inputs).float(), torch.arange(BATCH)))
    backend.step()


def topology_of(backend: Backend, **schedule: float) -> TopologyEngine:
    return TopologyEngine(
        backend.model,
        backend.access,
        UpdateSchedule(total_steps=20, **schedule),
        group=dist.group.WORLD,  # type: ignore[arg-type]
    )


@torch.no_grad()
def dense_weights(backend: Backend) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights in float64, packed ones as dense weights with zeros; and the masks, bool. By name, flat. A collective."""
    access, packed = backend.access, packed_layers(backend.model)
    weights, masks = {}, {}
    for name, parameter in backend.model.named_parameters():
        owner, _, kind = name.rpartition(".")
        value = access.read(parameter).double().flatten()
        if owner not in packed or kind == "bias":
            weights[name] = value.clone()
        elif kind == "values":
            masks[name] = bits.unpack(access.read(packed[owner].mask), packed[owner].shape.numel())
            weights[name] = torch.zeros(masks[name].numel(), dtype=torch.float64).masked_scatter_(masks[name], value)
    return weights, masks


class Twin(nn.Module):
    """Dense weights that are trained elsewhere."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(weights)
        self.weights = nn.ParameterList(weights.values())

    @torch.no_grad()
    def set(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in zip(self.names, self.weights, strict=True):
            parameter.copy_(weights[name])


@dataclass
class Averages:
    """What a rank saw.

    Attributes:
        largest_error: of any average after any step, against timm's.
        moved: weights that came at the updates.
        logits_error: of the model with averages in the place of weights, against the same model on one process.
        changed: by how much logits changed meanwhile.
        restored: whether they were afterwards what they were before, bit by bit, and parameters too.
    """

    largest_error: float
    moved: int
    logits_error: float
    changed: float
    restored: bool


def averaged(kind: str, bf16: bool) -> Averages:
    backend = build_backend(kind, small_vit(), lambda module: adamw(module, lr=1e-2), micro_batch_size=BATCH, bf16=bf16)
    topology = topology_of(backend, update_every=UPDATE_EVERY)
    ema = Ema(backend.wrapped, topology, DECAY)
    twin = Twin(dense_weights(backend)[0])
    timms = ModelEmaV3(twin, decay=DECAY)
    error, moved = 0.0, 0
    for step in range(1, STEPS + 1):
        train_step(backend, images(10 * step + dist.get_rank()))
        ema.update()
        weights, before = dense_weights(backend)
        twin.set(weights)
        timms.update(twin)
        if topology.step():
            _, after = dense_weights(backend)
            moved += sum(int((after[name] & ~before[name]).sum()) for name in after)
            with torch.no_grad():
                for name, average in zip(twin.names, timms.module.weights, strict=True):
                    # What is dropped is forgotten. A weight that wasn't there has an average of 0, which is its value.
                    average.mul_(after.get(name, torch.ones(())))
        error = max(error, distance_to(timms, twin.names, backend, ema))
    return Averages(error, moved, *logits_with(ema, backend, bf16))


@torch.no_grad()
def distance_to(timms: ModelEmaV3, names: list[str], backend: Backend, ema: Ema) -> float:
    parameters, (_, masks) = dict(backend.model.named_parameters()), dense_weights(backend)
    error = 0.0
    for name, average in zip(names, timms.module.weights, strict=True):
        expected = average[masks[name]] if name in masks else average
        found = ema.read(parameters[name])
        assert found.dtype == torch.float32
        error = max(error, float((found.flatten().double() - expected).abs().max()))
    return error


@torch.no_grad()
def logits_with(ema: Ema, backend: Backend, bf16: bool) -> tuple[float, float, bool]:
    inputs = images(0)
    parameters = dict(backend.model.named_parameters())
    twin = small_vit()
    for name, parameter in twin.named_parameters():
        value = ema.read(parameters[name]) if parameter.requires_grad else backend.access.read(parameters[name])
        parameter.copy_(value.view_as(parameter))
    before, held = backend.forward(inputs), snapshot(backend)
    with ema.in_place_of_weights():
        within = backend.forward(inputs)
    after = backend.forward(inputs)
    restored = torch.equal(before, after) and all(map(torch.equal, held, snapshot(backend)))
    error = float((within.float() - twin(inputs)).abs().max())
    return error, float((within - before).abs().max()), restored


def snapshot(backend: Backend) -> list[Tensor]:
    return [backend.access.read(parameter).clone() for parameter in backend.model.parameters()]


CASES = [("single", 1, False), ("ddp", 2, False), *((kind, 2, False) for kind in ("fsdp2", "zero1", "zero2", "zero3"))]
CASES += [("zero3", 3, False), ("fsdp2", 3, True), ("zero1", 2, True), ("zero3", 2, True)]


@pytest.mark.parametrize(("kind", "world_size", "bf16"), CASES)
def test_ema_equals_timms_of_the_dense_model(kind: str, world_size: int, bf16: bool) -> None:
    for found in run_on_ranks(world_size, averaged, kind, bf16):
        assert found.largest_error < 1e-6
        assert found.moved > 50
        assert found.logits_error < (0.05 if bf16 else 1e-5)
        assert found.changed > (0.05 if bf16 else 1e-3)
        assert found.restored


def grown_units(kind: str) -> set[str]:
    """What came at updates; checks the averages after each. Runs on every rank."""
    model = units_vit()
    backend = build_backend(kind, model, lambda module: adamw(module, lr=1e-2), micro_batch_size=BATCH)
    topology = topology_of(backend, update_every=1, unit_drop_fraction=0.5)
    ema = Ema(model, topology, DECAY)
    came: set[str] = set()
    for step in range(1, 9):
        train_step(backend, images(step))
        ema.update()
        before = unit_averages(topology, ema)
        topology.step()
        for name, after in unit_averages(topology, ema).items():
            for unit, rows in after.averages.items():
                expected = before[name].averages.get(unit, after.weights[unit])
                assert all(map(torch.equal, rows, expected)), (name, unit)
            if after.averages.keys() - before[name].averages.keys():
                came.add(topology.layers[name].unit)
    return came


@dataclass
class Units:
    """By number of each active unit, its rows of each tensor."""

    averages: dict[int, list[Tensor]]
    weights: dict[int, list[Tensor]]


@torch.no_grad()
def unit_averages(topology: TopologyEngine, ema: Ema) -> dict[str, Units]:
    """By layer. A collective."""
    found = {}
    for name, layer in topology.layers.items():
        mask = bits.unpack(topology.access.read(layer.mask), layer.shape.numel())
        units = found[name] = Units({}, {})
        for moving in layer.unit_parameters().values():
            for rows_of, source in ((units.averages, ema), (units.weights, topology.access)):
                rows = source.read(moving.parameter).reshape(moving.repeats, layer.num_active, -1)
                for place, unit in enumerate(mask.nonzero().flatten().tolist()):
                    rows_of.setdefault(unit, []).append(rows[:, place].clone())
    return found


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("fsdp2", 2), ("zero3", 2)])
def test_ema_of_a_grown_head_or_neuron_begins_with_its_initial_rows(kind: str, world_size: int) -> None:
    for came in run_on_ranks(world_size, grown_units, kind):
        assert came == {"heads", "neurons"}


EMA = ("train.ema_decay=0.9", "train.eval_ema=true")


@pytest.mark.parametrize(("engine", "other"), [("fsdp2", ("zero1", 3)), ("zero3", ("single", 1))])
def test_resumed_run_keeps_its_average(tmp_path: Path, digits: Path, engine: str, other: tuple[str, int]) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"

    def config(run_dir: Path, engine: str, last_step: int) -> Config:
        batch = "train.global_batch_size=12"
        return tiny_config(digits, run_dir, *ENGINES[engine], *EMA, batch, f"train.max_steps={last_step}")

    ended = run_on_ranks(2, run, config(straight, engine, 10))
    saved = run_on_ranks(2, run, config(stopped, engine, 6))
    assert any(name.endswith(":ema") for name in saved[0].tensors)
    assert_same_state(saved, run_on_ranks(other[1], loaded, config(stopped, other[0], 6)))
    assert_same_state(ended, run_on_ranks(2, resumed_run, config(stopped, engine, 10)))
    last, again = metrics_of(straight)[-1], metrics_of(stopped)[-1]
    for name in ("eval_ema_loss", "eval_ema_accuracy", "eval_ema_top5", "eval_loss"):
        assert last[name] == again[name]
    assert last["eval_ema_loss"] != last["eval_loss"]
    assert not np.isnan(last["eval_ema_loss"])
