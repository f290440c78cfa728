"""Given equal scores, prune-and-grow is bit-identical for every world size on every engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from svite_scale.engines.backend import Backend
from svite_scale.errors import TopologyError
from svite_scale.sparsity.packing import PACKED_TYPE, random_mask, replace_module
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from tests import reference
from tests.engines.engines import SHARED, adamw, build_backend
from tests.ranks import run_on_ranks

INF, NAN = float("inf"), float("nan")
DENORMAL = 2.0**-149
VALUES = [0.0, -0.0, DENORMAL, -DENORMAL, 3 * DENORMAL, 2.0**-126, 1.0, -1.0, 1.0 + 2**-23, 2.0, -3e38]
GRADIENTS = [0.0, -0.0, DENORMAL, -2 * DENORMAL, 2.0**-126, 1.0, -1.0, 1.0 + 2**-22, 3.0, 3e37, -3e37]
COUNTS = {"one": 1, "pair": 1, "seven": 7, "conv": 31, "wide": 143, "middle": 133, "large": 5003}
LAYERS: dict[str, Callable[[], nn.Linear | nn.Conv2d]] = {
    "one": lambda: nn.Linear(9, 7),
    "pair": lambda: nn.Linear(2, 1),
    "seven": lambda: nn.Linear(4, 2, bias=False),
    "conv": lambda: nn.Conv2d(3, 5, 3),
    "wide": lambda: nn.Linear(37, 11),
    "middle": lambda: nn.Linear(19, 14),
    "large": lambda: nn.Linear(131, 127),
}
"""No count above 1 is divisible by 2, 3 or 4; ``pair``, ``one`` and ``seven`` have fewer weights or values than ranks."""

RATES = [reference.cosine_rate(0.5, 0.005, step, 8) for step in (1, 2)]


class Bag(nn.Module):
    """Packed layers of awkward sizes; it never runs forward."""

    def __init__(self) -> None:
        super().__init__()
        for name, build in LAYERS.items():
            setattr(self, name, build())
            dense = getattr(self, name)
            packed = PACKED_TYPE[type(dense)](dense, COUNTS[name], name)
            packed.set_weight(dense.weight, random_mask(dense.weight.numel(), COUNTS[name], 0, name))
            replace_module(self, name, packed)


@dataclass
class Scores:
    """Values and dense gradients by layer name, for one update."""

    values: dict[str, list[float]]
    gradients: dict[str, list[float]]


@dataclass
class Outcome:
    """What one rank of an engine answered.

    Attributes:
        masks: after each update, by layer name.
        values: after each update, by layer name.
        averages: growth scores of gradients that differ between ranks and micro-batches.
        averaged_masks: the decision by these.
        refusals: by what was wrong, the message of the error.
        postponements: by what wasn't finite, what became of the update.
    """

    masks: list[dict[str, list[bool]]]
    values: list[dict[str, list[float]]]
    averages: dict[str, list[float]]
    averaged_masks: dict[str, list[bool]]
    refusals: dict[str, str]
    postponements: dict[str, Postponement]


@dataclass
class Postponement:
    """An update that was put off.

    Attributes:
        postponed: how many updates were.
        untouched: whether masks and values stayed as they were.
        retried: the step after which the update came.
    """

    postponed: int
    untouched: bool
    retried: int


def crafted_scores() -> list[Scores]:
    """Two updates' worth of heavy ties, zeros of both signs, denormals, and huge gradients."""
    draw = random.Random(0)
    return [
        Scores(
            {name: draw.choices(VALUES, k=count) for name, count in COUNTS.items()},
            {name: draw.choices(GRADIENTS, k=numel(name)) for name in LAYERS},
        )
        for _ in range(2)
    ]


def numel(name: str) -> int:
    return int(np.prod(LAYERS[name]().weight.shape))


def integer_gradients(rank: int, micro_step: int) -> dict[str, list[float]]:
    """What one rank's micro-batch contributes: small integers, so that sums are exact and tie often."""
    draw = random.Random(10 * rank + micro_step)
    return {name: [float(draw.randint(-3, 3)) for _ in range(numel(name))] for name in LAYERS}


class Driver:
    """Feeds crafted scores to an engine's topology, on one rank."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.topology = TopologyEngine(
            backend.model, backend.access, UpdateSchedule(total_steps=10, update_every=1), group=dist.group.WORLD
        )
        self.layers = self.topology.layers

    def write(self, values: dict[str, list[float]]) -> None:
        for name, layer in self.layers.items():
            self.backend.access.write(layer.values, torch.tensor(values[name]))

    def record_gradient(self, gradients: dict[str, list[float]]) -> None:
        """Gives each named layer a dense gradient, as its backward would."""
        for name, gradient in gradients.items():
            sink = self.layers[name].gradient_hook
            assert sink is not None
            sink(torch.tensor(gradient).view(self.layers[name].shape))

    def refusal(self) -> str:
        """The message with which the update is refused."""
        with pytest.raises(TopologyError) as caught:
            self.topology.step()
        return str(caught.value)

    def masks(self) -> dict[str, list[bool]]:
        return {name: unpacked(self.backend.access.read(layer.mask), numel(name)) for name, layer in self.layers.items()}

    def values(self) -> dict[str, list[float]]:
        return {name: self.backend.access.read(layer.values).tolist() for name, layer in self.layers.items()}


def unpacked(mask: Tensor, size: int) -> list[bool]:
    return np.unpackbits(mask.numpy(), bitorder="little")[:size].astype(bool).tolist()


def decide(kind: str, updates: list[Scores]) -> Outcome:
    """Runs on every rank."""
    backend = build_backend(kind, Bag(), adamw)
    driver = Driver(backend)
    outcome = Outcome([], [], {}, {}, {}, {})
    for scores in updates:
        driver.write(scores.values)
        driver.record_gradient(scores.gradients)
        driver.topology.step()
        outcome.masks.append(driver.masks())
        outcome.values.append(driver.values())

    driver = Driver(backend)
    driver.write(updates[0].values)
    for micro_step in range(2):
        driver.record_gradient(integer_gradients(dist.get_rank(), micro_step))
    outcome.averages = {name: driver.topology.growth.gather(layer).tolist() for name, layer in driver.layers.items()}
    driver.topology.step()
    outcome.averaged_masks = driver.masks()

    outcome.refusals = refusals(backend, updates[0].values)
    outcome.postponements = postponements(backend, updates[0].values)
    return outcome


def refusals(backend: Backend, values: dict[str, list[float]]) -> dict[str, str]:
    found = {}
    gradients = integer_gradients(0, 0)
    driver = Driver(backend)
    driver.write({**values, "wide": [NAN, *values["wide"][1:]]})
    driver.record_gradient(gradients)
    found["value"] = driver.refusal()

    driver = Driver(backend)
    driver.write(values)
    driver.record_gradient({name: gradient for name, gradient in gradients.items() if name != "middle"})
    found["no gradient"] = driver.refusal()
    return found


def postponements(backend: Backend, values: dict[str, list[float]]) -> dict[str, Postponement]:
    found = {}
    gradients = integer_gradients(0, 0)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    poisons = {"NaN of one rank": NAN if rank == last else 0.0, "infinity of one rank": -INF if rank == 0 else 0.0}
    if last > 0:
        poisons["opposite infinities"] = INF if rank % 2 else -INF
    for what, poison in poisons.items():
        driver = Driver(backend)
        driver.write(values)
        before = driver.masks(), driver.values()
        # One weight of one layer is enough, wherever it is.
        driver.record_gradient({**gradients, "conv": [*gradients["conv"][:-1], poison]})
        assert driver.topology.step() is None
        untouched = (driver.masks(), driver.values()) == before
        driver.record_gradient(gradients)
        update = driver.topology.step()
        found[what] = Postponement(driver.topology.postponed, untouched, update.step if update else 0)
    return found


def moved(name: str, rate: float) -> int:
    return math.ceil(rate * COUNTS[name])


def initial_masks() -> dict[str, list[bool]]:
    return {name: random_mask(numel(name), count, 0, name).tolist() for name, count in COUNTS.items()}


def decided(name: str, mask: list[bool], values: list[float], gradient: list[float], rate: float) -> list[bool]:
    """The reference's new mask of a layer."""
    dense = iter(values)
    drop = [abs(next(dense)) if active else NAN for active in mask]
    return reference.prune_and_grow(mask, drop, [abs(entry) for entry in gradient], moved(name, rate))


def expected_masks(updates: list[Scores]) -> list[dict[str, list[bool]]]:
    masks = [initial_masks()]
    for scores, rate in zip(updates, RATES, strict=True):
        masks.append(
            {name: decided(name, mask, scores.values[name], scores.gradients[name], rate) for name, mask in masks[-1].items()}
        )
    return masks


ENGINES: list[tuple[str, int]] = [("single", 1), *((kind, size) for size in (1, 2, 3) for kind in SHARED)]
ENGINES += [("fsdp2", 4), ("zero3", 4)]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: f"{engine[0]}_on_{engine[1]}")
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """What each rank of an engine answered."""
    kind, world_size = request.param
    return run_on_ranks(world_size, decide, kind, crafted_scores())


def test_the_topology_is_that_of_the_reference(outcomes: list[Outcome]) -> None:
    before, *after = expected_masks(crafted_scores())
    assert after[0] != before
    assert after[1] != after[0]
    for outcome in outcomes:
        assert outcome.masks == after


def test_values_follow_their_positions_exactly(outcomes: list[Outcome]) -> None:
    """But for the sign of a zero, which the all-reduce in ZeRO-1 and 2's reading loses."""
    masks = expected_masks(crafted_scores())
    for update, scores in enumerate(crafted_scores()):
        for name in LAYERS:
            old = iter(scores.values[name])
            dense = np.array([next(old) if active else 0.0 for active in masks[update][name]], dtype=np.float32)
            for outcome in outcomes:
                assert outcome.values[update][name] == dense[masks[update + 1][name]].tolist(), name


def test_gradients_are_averaged_over_ranks_and_added_over_micro_batches(outcomes: list[Outcome]) -> None:
    world_size, values = len(outcomes), crafted_scores()[0].values
    recorded = [integer_gradients(rank, micro_step) for rank in range(world_size) for micro_step in range(2)]
    before = expected_masks(crafted_scores())[-1]
    for name in LAYERS:
        total = [sum(column) for column in zip(*(gradients[name] for gradients in recorded), strict=True)]
        average = [abs(entry) / world_size for entry in total]
        for outcome in outcomes:
            assert outcome.averages[name] == pytest.approx(average, rel=1e-6, abs=1e-6)
            assert outcome.averages[name] == outcomes[0].averages[name], "ranks disagree on the scores"
            # By the whole numbers, not by their thirds: what ties in the one must in the other.
            expected = decided(name, before[name], values[name], total, RATES[0])
            assert outcome.averaged_masks[name] == expected, name


def test_what_cant_be_decided_is_refused_with_the_layers_name(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        refused = outcome.refusals
        assert refused["value"] == "topology update of wide after step 1: 1 of 143 drop scores are NaN"
        assert refused["no gradient"].startswith("no gradient of middle was recorded before a topology update: ")


def test_an_update_on_gradients_that_arent_finite_is_postponed_and_counted(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert len(outcome.postponements) == (3 if len(outcomes) > 1 else 2)
        for what, postponement in outcome.postponements.items():
            assert postponement == Postponement(postponed=1, untouched=True, retried=2), what
