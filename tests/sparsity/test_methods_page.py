"""What docs/methods.md shows works as it says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from svite_scale.config.schema import SparsityConfig
from svite_scale.errors import OptionError
from svite_scale.sparsity.options import METHODS as NAMES
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.methods import METHODS
from tests import reference
from tests.sparsity.packed_trainer import STOP, UPDATE_EVERY, PackedTrainer, active_units, batch

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def test_the_method_of_the_page_drops_by_sensitivity() -> None:
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
        assert active_units(layer) == expected
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
    where_weights_are = {
        "density",
        "distribution",
        "power_scale",
        "densities",
        "masks",
        "block",
        "keep_dense",
        "init",
        "structured",
        "tokens",
    }
    assert found == fields - where_weights_are - {"method"}


OWN_MODULE = """
from svite_scale.sparsity.options import Method
from svite_scale.sparsity.topology.methods import gradient_magnitude

def largest_first(candidates):
    return candidates.values().abs_().neg_()

backwards = Method(drop=largest_first, grow=gradient_magnitude)
no_method = 7
"""


@pytest.fixture
def own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``own_methods`` that can be imported, and one that can't."""
    (tmp_path / "own_methods.py").write_text(OWN_MODULE)
    (tmp_path / "broken_methods.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_methods")
def test_a_method_named_by_import_path_moves_the_weights_that_it_chooses() -> None:
    by_path = masks_after_an_update(TopologyOptions(method="own_methods:backwards"))
    own = import_module("own_methods").backwards
    assert by_path == masks_after_an_update(TopologyOptions(method=own))
    assert by_path != masks_after_an_update(TopologyOptions())


def masks_after_an_update(options: TopologyOptions) -> dict[str, list[bool]]:
    packed = PackedTrainer(options)
    for step in range(1, UPDATE_EVERY + 1):
        packed.backward(*batch(step))
        update = packed.step()
    assert update is not None
    return {name: active_units(layer) for name, layer in packed.topology.layers.items()}


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("no_such_module:a", "can't be imported (ModuleNotFoundError: No module named 'no_such_module'); check the name, and"),
        ("own_methods:missing", "can't be imported (AttributeError: module 'own_methods' has no attribute 'missing')"),
        ("broken_methods:a", "can't be imported (ZeroDivisionError: division by zero)"),
        ("own_methods:no_method", "is of type int, and no Method; name a svite_scale.Method"),
        (":", "can't be imported (ValueError: Empty module name)"),
    ],
)
def test_an_import_path_without_a_method_is_refused_in_one_line(method: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"method = {method!r}: {message}")) as caught:
        PackedTrainer(TopologyOptions(method=method))
    assert "\n" not in str(caught.value)


def test_every_built_in_method_has_scores_and_no_other_has() -> None:
    assert tuple(METHODS) == NAMES


def written(value: object) -> str:
    """A default as the page writes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
