"""Packed training against the naive dense-masked reference in float64: gradients, dropped and grown sets, weights, moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from svite_scale.sparsity.options import TopologyOptions
from tests import reference
from tests.sparsity.packed_trainer import (
    STEPS,
    STOP,
    UPDATE_EVERY,
    PackedTrainer,
    active_elements,
    active_units,
    assert_close,
    assert_state,
    batch,
)
from tests.sparsity.packing import packed_layers, positions_of_units


def assert_gradients(packed: PackedTrainer, naive: reference.MaskedTrainer, step: int) -> None:
    layers = packed_layers(packed.model)
    for name, parameter in packed.model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in layers and kind in ("values", "mask"):
            continue
        assert_close(parameter.grad, naive.gradients[name], f"{name} in step {step}")
    for name, layer in layers.items():
        dense = naive.gradients[f"{name}.weight"]
        assert_close(layer.values.grad, active_elements(layer, dense), f"{name} in step {step}")
        assert (name in packed.recorded) == (step % UPDATE_EVERY == 0 and step <= STOP), "only in update steps"
        if name in packed.recorded:
            in_units = dense.flatten()[positions_of_units(dense.shape, layer.grid.block)].flatten()
            torch.testing.assert_close(packed.recorded[name], in_units.abs().float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("grown_moments", "block"), [("mean", (1, 1)), ("zero", (1, 1)), ("mean", (16, 1)), ("zero", (4, 2)), ("mean", (16, 8))]
)
def test_packed_training_is_dense_masked_training(grown_moments: str, block: tuple[int, int]) -> None:
    packed = PackedTrainer(TopologyOptions(grown_moments=grown_moments), block)
    layers, naive = packed.topology.layers, packed.naive_twin()
    updates = regrown = came = 0
    for step in range(1, STEPS + 1):
        images, labels = batch(step)
        assert packed.backward(images, labels) == pytest.approx(naive.step(images, labels), rel=1e-9)
        assert_gradients(packed, naive, step)
        update = packed.step()
        assert (update is not None) == (step % UPDATE_EVERY == 0 and step <= STOP)
        if update is not None:
            updates += 1
            rate = reference.cosine_rate(0.5, 0.005, step, STOP)
            assert update.drop_fraction == pytest.approx(rate)
            for name, layer in layers.items():
                count = int(np.ceil(rate * layer.num_active))
                dropped, grown = naive.update(f"{name}.weight", count, grown_moments)
                assert update.layers[name].dropped == count
                assert update.layers[name].regrown == count - len(grown) == count - len(dropped)
                regrown, came = regrown + count - len(grown), came + len(grown)
        assert_state(packed, naive, step)
    assert updates == 4
    assert regrown > 0, "some weights were dropped and grown in one update"
    assert came > 400 / math.prod(block)


def test_ever_active_is_the_union_of_all_masks() -> None:
    packed = PackedTrainer()
    layers = packed.topology.layers
    seen = {name: torch.tensor(active_units(layer)) for name, layer in layers.items()}
    total = sum(mask.numel() for mask in seen.values())
    shares: list[float] = []
    for step in range(1, STEPS + 1):
        packed.backward(*batch(step))
        update = packed.step()
        seen = {name: seen[name] | torch.tensor(active_units(layer)) for name, layer in layers.items()}
        shares += [update.ever_active()] if update else []
        assert update is None or update.ever_active() == sum(int(mask.sum()) for mask in seen.values()) / total
    assert 0.31 < shares[0] < shares[-1]
    assert shares[-1] > 0.35
