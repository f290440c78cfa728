"""Every method, growth window and warm-up against the naive dense-masked trainer, with the statistics by sets of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.methods import METHODS, Candidates, Method, magnitude
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.sparsity.topology.statistics import LayerUpdate, TopologyUpdate
from tests import reference
from tests.sparsity.packed_trainer import STEPS, STOP, UPDATE_EVERY, PackedTrainer, active_units, assert_state, batch
from tests.sparsity.packing import packed_layers

SEED, SHARE = 3, 0.3


def chosen_units(active: Sequence[bool]) -> set[int]:
    return {unit for unit, is_active in enumerate(active) if is_active}


class Twins:
    """A packed training and its naive twin, which grows by what ``grow_scores`` says. Units are weights, or blocks of them.

    Attributes:
        recorded: the naive gradients of each step, by layer name.
        initial: units active from the start and never dropped, by layer name.
        ever: units that have ever been active.
        recently_grown: units grown at the last update.
    """

    def __init__(self, options: TopologyOptions, block: tuple[int, int] = (1, 1)) -> None:
        self.options = options
        self.packed = PackedTrainer(options, block)
        self.naive = self.packed.naive_twin()
        self.recorded: list[dict[str, Tensor]] = []
        self.initial = {name: chosen_units(active_units(layer)) for name, layer in packed_layers(self.packed.model).items()}
        self.ever = {name: set(active) for name, active in self.initial.items()}
        self.recently_grown: dict[str, set[int]] = {name: set() for name in self.initial}
        self.came = 0
        self.survivals: list[float] = []

    def step(self, step: int) -> None:
        images, labels = batch(step)
        warmup, since = self.options.grown_warmup_steps, (step - 1) % UPDATE_EVERY + 1
        for name, grown in self.recently_grown.items():
            share = torch.ones_like(self.naive.weights[f"{name}.weight"])
            if warmup:
                units = self.naive.units[f"{name}.weight"]
                share.view(-1)[[position for unit in grown for position in units[unit]]] = min(1.0, since / warmup)
            self.naive.lr_shares[f"{name}.weight"] = share
        self.packed.backward(images, labels)
        self.naive.step(images, labels)
        self.recorded.append({name: self.naive.gradients[f"{name}.weight"] for name in self.initial})
        due = step % UPDATE_EVERY == 0 and step <= STOP and self.options.method != "static"
        update = self.packed.step()
        assert (update is not None) == due
        if update is not None:
            self.check_update(update)
        assert_state(self.packed, self.naive, step)

    def check_update(self, update: TopologyUpdate) -> None:
        rate = reference.cosine_rate(0.5, 0.005, update.step, STOP)
        for name, found in update.layers.items():
            count = math.ceil(rate * found.num_active)
            weight = self.naive.norms(f"{name}.weight", self.naive.weights[f"{name}.weight"])
            before = chosen_units(self.naive.active_units(f"{name}.weight"))
            protected = self.recently_grown[name] if self.options.protect_grown else set()
            goes = set(sorted(before, key=lambda unit: (unit in protected, weight[unit], unit))[:count])
            scores = self.grow_scores(name, update.step, count, set(range(len(weight))) - (before - goes))
            left, came = self.naive.update(f"{name}.weight", count, self.options.grown_moments, scores, protected)
            after = chosen_units(self.naive.active_units(f"{name}.weight"))
            chosen = after - (before - goes)
            self.check_layer(name, found, count, left, came, after)
            assert (found.ever_active, found.initial_survivors) == (len(self.ever[name]), len(self.initial[name]))
            assert found.drop_threshold == pytest.approx(max(weight[unit] for unit in goes), rel=1e-6)
            assert found.grow_threshold == pytest.approx(min(scores[unit] for unit in chosen), rel=1e-5)
            self.came += len(came)
        with pytest.raises(TopologyError, match="no layer counts 'heads'; choose one of "):
            update.ever_active("heads")
        for unit in update.units:
            layers = {name: layer for name, layer in update.layers.items() if layer.unit == unit}
            ever = sum(len(self.ever[name]) for name in layers)
            assert update.ever_active(unit) == ever / sum(layer.numel for layer in layers.values())
            assert_metrics(update, unit)

    def check_layer(self, name: str, found: LayerUpdate, count: int, left: set[int], came: set[int], after: set[int]) -> None:
        assert (found.dropped, found.grown, found.regrown) == (count, len(came), count - len(left))
        self.initial[name] -= left
        stayed = len(self.recently_grown[name] & after) / len(self.recently_grown[name]) if self.recently_grown[name] else None
        assert found.grown_survival == stayed
        self.survivals += [] if stayed is None else [stayed]
        self.recently_grown[name], self.ever[name] = came, self.ever[name] | after

    def grow_scores(self, name: str, step: int, count: int, inactive: set[int]) -> list[float]:
        window = [gradients[name] for gradients in self.recorded[-self.options.grow_window :]]
        if self.options.grow_by == "magnitude":
            gradient = sum(entry.abs() for entry in window) / len(window)
        else:
            gradient = abs(sum(window) / len(window))
        scores = self.naive.norms(f"{name}.weight", torch.as_tensor(gradient))
        drawn = reference.hashed_uniform(SEED, step, name, range(len(scores)))
        if self.options.method == "set":
            return drawn
        if self.options.method == "mixed":
            for unit in sorted(inactive, key=lambda unit: -drawn[unit])[: round(self.options.random_share * count)]:
                scores[unit] = math.inf
        return scores


def assert_metrics(update: TopologyUpdate, unit: str) -> None:
    """What a run logs of the layers of a kind of unit: totals, and every figure of every layer."""
    metrics, prefix = update.metrics(), "" if unit == "weights" else f"{unit}/"
    layers = {name: layer for name, layer in update.layers.items() if layer.unit == unit}
    moved = {figure: metrics[prefix + figure] for figure in ("dropped", "grown", "regrown")}
    assert moved["dropped"] == sum(layer.dropped for layer in layers.values()) == moved["grown"] + moved["regrown"]
    survivors = sum(layer.initial_survivors for layer in layers.values())
    assert metrics[f"{prefix}initial_survival"] == survivors / sum(layer.num_active for layer in layers.values())
    for name, layer in layers.items():
        assert metrics[f"layers/density/{name}"] == layer.num_active / layer.numel
        assert metrics[f"layers/initial_survival/{name}"] == update.layers[name].initial_survivors / layer.num_active
        assert metrics[f"layers/ever_active/{name}"] == update.layers[name].ever_active / layer.numel
        for figure in ("dropped", "grown", "regrown", "drop_threshold"):
            assert metrics[f"layers/{figure}/{name}"] == getattr(layer, figure)
        threshold = layer.grow_threshold
        assert metrics.get(f"layers/grow_threshold/{name}") == (None if threshold == math.inf else threshold)
        assert metrics.get(f"layers/grown_survival/{name}") == layer.grown_survival


OPTIONS = {
    "svite": TopologyOptions(),
    "set": TopologyOptions(method="set", seed=SEED),
    "mixed": TopologyOptions(method="mixed", seed=SEED, random_share=SHARE),
    "mixed, all of it at random": TopologyOptions(method="mixed", seed=SEED, random_share=1.0),
    "a window of three steps": TopologyOptions(grow_window=3),
    "a window from update to update": TopologyOptions(grow_window=UPDATE_EVERY),
    "magnitudes over a window": TopologyOptions(grow_window=3, grow_by="magnitude"),
    "warm-up": TopologyOptions(grown_warmup_steps=3),
    "warm-up from update to update": TopologyOptions(grown_warmup_steps=UPDATE_EVERY, grown_moments="zero"),
    "protection": TopologyOptions(protect_grown=True),
    "all at once": TopologyOptions(
        method="mixed",
        seed=SEED,
        random_share=SHARE,
        grow_window=2,
        grow_by="magnitude",
        grown_warmup_steps=2,
        protect_grown=True,
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_statistics_are_those_of_the_naive_twin(name: str) -> None:
    twins = Twins(OPTIONS[name])
    for step in range(1, STEPS + 1):
        twins.step(step)
    assert twins.came > 50, "weights came that were elsewhere before"
    assert all(len(twins.initial[layer]) < twins.packed.topology.layers[layer].num_active for layer in twins.initial)
    assert len(twins.survivals) > 20
    assert (min(twins.survivals) == 1.0) == OPTIONS[name].protect_grown, "what was grown survives where it is protected"


@pytest.mark.parametrize(("name", "block"), [("set", (4, 2)), ("magnitudes over a window", (4, 2)), ("all at once", (16, 1))])
def test_training_and_statistics_in_blocks_are_those_of_the_naive_twin(name: str, block: tuple[int, int]) -> None:
    twins = Twins(OPTIONS[name], block)
    assert [layer.unit for layer in twins.packed.topology.layers.values()] == ["blocks"] * 9 + ["weights"]
    for step in range(1, STEPS + 1):
        twins.step(step)
    assert twins.came > 50


def test_static_keeps_the_mask_and_records_nothing() -> None:
    twins = Twins(TopologyOptions(method="static"))
    topology = twins.packed.topology
    assert topology.next_update is None
    for step in range(1, STEPS + 1):
        twins.step(step)
        assert not twins.packed.recorded
        assert topology.drop_fraction == 0.0
    layers = packed_layers(twins.packed.model)
    assert all(chosen_units(active_units(layer)) == twins.initial[name] for name, layer in layers.items())


def test_gradients_are_recorded_in_the_window_and_at_no_other_step() -> None:
    packed = PackedTrainer(TopologyOptions(grow_window=3))
    recorded = []
    for step in range(1, STEPS + 1):
        packed.backward(*batch(step))
        recorded += [step] if packed.recorded else []
        packed.step()
        assert not packed.topology.growth.sums or step % UPDATE_EVERY in (2, 3), "nothing is held out of the window"
    assert recorded == [2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_postponed_update_waits_for_a_whole_window(poison: float) -> None:
    """Of two steps: the third and fourth are recorded for the update after the fourth, and then the fifth and sixth instead."""
    packed = PackedTrainer(TopologyOptions(grow_window=2))
    layer = next(iter(packed.topology.layers.values()))
    updates = []
    for step in range(1, 9):
        packed.backward(*batch(step))
        if step == 3:
            assert layer.gradient_hook is not None
            layer.gradient_hook(torch.full(layer.shape, poison))
        update = packed.step()
        updates += [update.step] if update else []
    assert updates == [6, 8]
    assert packed.topology.postponed == 1


def test_an_update_postponed_past_the_stop_is_left_out() -> None:
    packed = PackedTrainer()
    for step in range(1, STEPS + 1):
        packed.backward(*batch(step))
        if step == STOP:
            layer = next(iter(packed.topology.layers.values()))
            assert layer.gradient_hook is not None
            layer.gradient_hook(torch.full(layer.shape, math.nan))
        assert (packed.step() is not None) == (step in (4, 8, 12))
    assert packed.topology.postponed == 1
    assert packed.topology.next_update is None


def test_the_methods_are_those_the_config_speaks_of() -> None:
    assert set(METHODS) == {"svite", "set", "mixed", "static", "dense"}


def largest_first(candidates: Candidates) -> Tensor:
    return -candidates.values().abs()


def of_wrong_shape(candidates: Candidates) -> Tensor:
    return candidates.values()[:3]


def test_a_method_of_the_users_own() -> None:
    packed = PackedTrainer(TopologyOptions(method=Method(drop=largest_first, grow=magnitude)))
    for step in range(1, UPDATE_EVERY + 1):
        packed.backward(*batch(step))
        before = {name: layer.dense_weight().abs() for name, layer in packed.topology.layers.items()}
        update = packed.step()
    assert update is not None
    for name, layer in packed.topology.layers.items():
        # What is dropped first is the largest, and of all that is inactive then, it is also what grows first.
        assert update.layers[name].regrown == update.layers[name].dropped
        assert before[name].shape == layer.shape


def test_a_score_of_the_wrong_shape_is_refused_with_the_layers_name() -> None:
    packed = PackedTrainer(TopologyOptions(method=Method(drop=of_wrong_shape, grow=magnitude)))
    for step in range(1, UPDATE_EVERY):
        packed.backward(*batch(step))
        packed.step()
    packed.backward(*batch(UPDATE_EVERY))
    with pytest.raises(
        TopologyError, match=r"topology update of .* after step 4: drop scores must be of shape \(\d+,\), not \(3,\)"
    ):
        packed.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "rigl"},
            "method = 'rigl': is no method; use one of svite, .*, dense, or MODULE:NAME of a Method",
        ),
        ({"grow_by": "momentum"}, "grow_by = 'momentum': is not one of gradient, magnitude; use one of gradient, magnitude"),
        ({"grown_moments": "max"}, "grown_moments = 'max': is not one of mean, zero; use one of mean, zero"),
        ({"method": None}, "method = None: is not text or a Method; use text or a Method"),
        ({"method": 5}, "method = 5: is not text or a Method"),
        ({"grow_by": None}, "grow_by = None: is not one of gradient, magnitude; use one of gradient, magnitude"),
        ({"grown_moments": None}, "grown_moments = None: is not one of mean, zero; use one of mean, zero"),
        ({"method": "mixed", "random_share": 1.5}, r"random_share = 1\.5: is above 1\.0"),
        ({"random_share": "half"}, r"random_share = 'half': is not a number; use a number of at least 0\.0 and up to 1\.0"),
        ({"seed": "x"}, "seed = 'x': is not a whole number"),
        ({"grow_window": 1.5}, r"grow_window = 1\.5: is not a whole number"),
        ({"grown_warmup_steps": 0.5}, r"grown_warmup_steps = 0\.5: is not a whole number"),
        ({"grow_window": 0}, "grow_window = 0: is below 1; use a whole number of at least 1"),
        ({"grown_warmup_steps": -1}, "grown_warmup_steps = -1: is below 0"),
        (
            {"grow_window": 5},
            "grow_window = 5: is longer than the 4 steps between two updates; shorten it",
        ),
        ({"grown_warmup_steps": 5}, "grown_warmup_steps = 5: is longer than the 4 steps between two updates"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTrainer(TopologyOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "update_every", "start", "says"),
    [("svite", 9, 0, True), ("svite", 8, 9, True), ("svite", 8, 8, False), ("static", 9, 0, False)],
)
def test_a_schedule_without_an_update_is_named_at_the_start(
    method: str, update_every: int, start: int, says: bool, caplog: pytest.LogCaptureFixture
) -> None:
    packed = PackedTrainer()
    schedule = UpdateSchedule(total_steps=10, update_every=update_every, start_step=start)
    with caplog.at_level("WARNING", logger="svite_scale"):
        TopologyEngine(packed.model, packed.topology.access, schedule, TopologyOptions(method=method))
    expected = (
        f"no weight will ever move: updates come every {update_every} steps from step {start} on, and stop after step 8 of 10; "
    )
    assert [message.startswith(expected) for message in caplog.messages] == [True] * says


@pytest.mark.parametrize("grow_by", ["gradient", "magnitude"])
def test_gradients_recorded_before_a_load_are_forgotten(grow_by: str) -> None:
    fresh, resumed = (PackedTrainer(TopologyOptions(grow_window=UPDATE_EVERY, grow_by=grow_by)) for _ in range(2))
    resumed.backward(*batch(2))
    resumed.topology.load_state_dict(fresh.topology.state_dict())
    for trainer in (fresh, resumed):
        trainer.backward(*batch(1))
        trainer.step()
    for name, expected in fresh.topology.growth.sums.items():
        assert torch.equal(resumed.topology.growth.sums[name], expected)
