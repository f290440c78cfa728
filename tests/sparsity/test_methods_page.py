"""What docs/methods.md shows works as it says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.config.topology import check_topology
from svite_scale.errors import ConfigError
from svite_scale.sparsity.topology.methods import METHODS, Method, magnitude, uniform_random
from svite_scale.sparsity.topology.options import TopologyOptions
from tests import reference
from tests.sparsity.packed_trainer import STOP, UPDATE_EVERY, PackedTrainer, batch, dense_mask

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def test_the_method_of_the_page_drops_what_matters_least_to_the_loss() -> None:
    names: dict[str, Any] = {}
    exec(PAGE.split("```python")[1].split("```")[0], names)
    packed = PackedTrainer(names["options"])
    naive = packed.naive_twin()
    for step in range(1, UPDATE_EVERY + 1):
        packed.backward(*batch(step))
        naive.step(*batch(step))
        update = packed.step()
    assert update is not None
    rate = reference.cosine_rate(0.5, 0.005, UPDATE_EVERY, STOP)
    for name, layer in packed.topology.layers.items():
        weight, gradient = (table[f"{name}.weight"].flatten() for table in (naive.weights, naive.gradients))
        before = naive.masks[f"{name}.weight"].flatten().tolist()
        count = math.ceil(rate * layer.num_active)
        sensitivity = (weight * gradient).abs().tolist()
        expected = reference.prune_and_grow(before, sensitivity, gradient.abs().tolist(), count)
        assert dense_mask(layer).flatten().tolist() == expected
        assert expected != reference.prune_and_grow(before, weight.abs().tolist(), gradient.abs().tolist(), count)


def test_the_page_names_every_method_and_every_default() -> None:
    assert all(f"| `{method}` |" in PAGE for method in METHODS)
    found = set()
    for line in PAGE.splitlines():
        keys, _, rest = line.removeprefix("| ").partition(" | ")
        if line.startswith("| `") and hasattr(SparsityConfig(), keys.split("`")[1]):
            found |= {key.strip("` ") for key in keys.split(",")}
            shown = [word.strip("` ") for word in rest.split(" | ")[0].split(",")]
            assert shown == [written(getattr(SparsityConfig(), key.strip("` "))) for key in keys.split(",")]

    fields = {each.name for each in dataclasses.fields(SparsityConfig)}
    where_weights_are = {"density", "distribution", "power_scale", "densities", "masks", "keep_dense", "structured", "tokens"}
    assert found == fields - where_weights_are - {"method"}


def test_a_line_in_the_table_is_all_that_a_method_needs() -> None:
    pair = Method(drop=magnitude, grow=uniform_random)
    config = Config(run_dir="r", sparsity=SparsityConfig(method="own"))
    with patch.dict(METHODS, {"own": pair}):
        check_topology(config)
        assert TopologyOptions(method="own").scores is pair
    with pytest.raises(ConfigError):
        check_topology(config)


def written(value: object) -> str:
    """A default as the page writes it."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
