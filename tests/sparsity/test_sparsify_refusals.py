"""Models and arguments that can't be made sparse: refused with a remedy, and left as they were."""

from __future__ import annotations

import re
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.packing import random_mask, sparsify
from tests.sparsity.packing import packed_layers

# The package's name sparsify is the function's.
sparsify_module = sys.modules[random_mask.__module__]


def tied(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return nn.ModuleDict({"first": first, "second": second})


@pytest.mark.parametrize(
    "model",
    [
        tied(nn.Linear(4, 4), nn.Linear(4, 4)),
        tied(nn.Embedding(4, 4), nn.Linear(4, 4)),
        tied(nn.Linear(4, 4), nn.Embedding(4, 4)),
    ],
)
def test_tied_weights_are_refused(model: nn.Module) -> None:
    with pytest.raises(TopologyError, match="first and second share a parameter; untie them"):
        sparsify(model, 0.5)
    assert not packed_layers(model), "a refused model is left as it was"


def test_a_tied_bias_is_refused() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    with pytest.raises(TopologyError, match="first and second share a parameter"):
        sparsify(nn.ModuleDict({"first": first, "second": second}), 0.5)


def test_weights_tied_among_dense_modules_are_allowed() -> None:
    first, second = nn.LayerNorm(4), nn.LayerNorm(4)
    second.weight = first.weight
    assert len(sparsify(nn.Sequential(first, second, nn.Linear(4, 4)), 0.5)) == 1


def test_packing_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    sparsify(model, 0.5)
    with pytest.raises(TopologyError, match="packed already"):
        sparsify(model, 0.5)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(TopologyError, match="LayerNorm has no Linear or Conv2d"):
        sparsify(nn.LayerNorm(3), 0.5)


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'erdos': is not one of uniform, er, erk; use one of uniform, er, erk"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), 0.5, distribution="erdos")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Linear(8, 8))


def state_of(model: nn.Module) -> list[tuple[str, int, bool]]:
    """Which tensors the model holds, and whether they are trained."""
    return [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]


def frozen() -> nn.Sequential:
    model = small()
    model[2].weight.requires_grad_(False)
    return model


def with_complex() -> nn.Sequential:
    model = small()
    model[2] = nn.Linear(8, 8, dtype=torch.complex64)
    return model


REFUSED = {
    "complex": (with_complex, "2: its weight is torch.complex64, and sparse weights are real; list it in keep_dense"),
    "frozen": (frozen, "2: its weight is frozen, and sparse weights are trained; list it in keep_dense"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_model_with_a_layer_that_cant_be_sparse_is_left_as_it_was(mistake: str) -> None:
    build, message = REFUSED[mistake]
    model = build()
    before = state_of(model)
    with pytest.raises(TopologyError, match=re.escape(message)):
        sparsify(model, 0.5, distribution="uniform")
    assert state_of(model) == before
    name = message[0]
    plan = sparsify(model, 0.5, distribution="uniform", keep_dense=[name])
    assert [entry.name for entry in plan if entry.is_packed] == sorted({"0", "1", "2"} - {name})
    kept = [parameter for parameter in before if parameter[0].startswith(name)]
    assert [parameter for parameter in state_of(model) if parameter[0].startswith(name)] == kept, "frozen stays frozen"


def test_a_frozen_layer_that_stays_dense_stays_frozen() -> None:
    model = frozen()
    before = state_of(model)
    sparsify(model, 1.0)
    assert state_of(model) == before


def test_nothing_is_changed_where_packing_fails_at_the_last_layer() -> None:
    model = small()
    before = state_of(model)

    def failing(numel: int, num_active: int, seed: int, name: str, device: torch.device) -> torch.Tensor:
        if name == "2":
            raise MemoryError
        return random_mask(numel, num_active, seed, name, device)

    with patch.object(sparsify_module, "random_mask", failing), pytest.raises(MemoryError):
        sparsify(model, 0.5, distribution="uniform")
    assert state_of(model) == before


def test_a_tied_layer_may_be_kept_dense() -> None:
    model = tied(nn.Embedding(4, 4), nn.Linear(4, 4))
    model.add_module("third", nn.Linear(4, 4))
    plan = sparsify(model, 0.5, keep_dense=["second"])
    assert [(entry.name, entry.kept_dense) for entry in plan] == [("second", True), ("third", False)]
    assert list(packed_layers(model)) == ["third"]


def test_exactly_one_source_is_needed() -> None:
    with pytest.raises(ValueError, match="give exactly one of density, densities and masks, not none"):
        sparsify(small())
    with pytest.raises(ValueError, match="not density and densities"):
        sparsify(small(), 0.5, densities={"*": 0.5})


def test_a_model_that_is_itself_a_layer_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"the model is itself a Linear; put it in an nn\.Sequential"):
        sparsify(nn.Linear(4, 4), 0.5)


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"^density = .*; use a number above 0\.0 and up to 1\.0"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), density)
