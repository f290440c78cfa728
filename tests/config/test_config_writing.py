"""A written config reads back equal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svite_scale.config.field_types import split_bounds, split_null
from svite_scale.config.load import read_config, to_dict, write_config
from svite_scale.config.plain_yaml import dump, load
from svite_scale.config.schema import Bounds, Config
from tests.config.config_text import hints_of

AMBIGUOUS = ["1e5", "5E-4", "0x10", "010", "1:30", "yes", "~", "<<", "=", "2026-01-31", "1.", ".5", "-.inf"]


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Valid values of a field, from its hint."""
    bare, bounds = split_bounds(hint)
    kind, nullable = split_null(bare)
    return st.none() | numbers_and_text(kind, bounds) if nullable else numbers_and_text(kind, bounds)


def numbers_and_text(kind: Any, bounds: Bounds) -> st.SearchStrategy[Any]:
    low = bounds.low if bounds.above is None else bounds.above
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is dict:
        entries = st.floats(low, bounds.high, exclude_min=bounds.above is not None)
        return st.dictionaries(st.sampled_from(AMBIGUOUS) | st.text(max_size=20), entries, max_size=3)
    if kind == tuple[str, ...]:
        return st.lists(st.text(max_size=20), max_size=4).map(tuple)
    if kind == tuple[int, ...]:
        return st.lists(st.integers(low, bounds.high), max_size=4).map(tuple)
    if get_origin(kind) is tuple:
        items = st.floats(low, bounds.high, exclude_min=bounds.above is not None, allow_nan=False, allow_infinity=False)
        return st.tuples(items, items) if get_args(kind)[-1] is float else st.lists(items, max_size=4).map(tuple)
    if kind is float:
        return st.floats(low, bounds.high, exclude_min=bounds.above is not None, allow_nan=False, allow_infinity=False)
    return {int: st.integers(low, bounds.high), bool: st.booleans(), str: st.text(max_size=20)}[kind]


def configs(section: type = Config) -> st.SearchStrategy[Any]:
    hints = get_type_hints(section, include_extras=True)
    return st.builds(
        section, **{name: configs(hint) if dataclasses.is_dataclass(hint) else values_of(hint) for name, hint in hints.items()}
    )


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(config=configs())
def test_a_written_config_reads_back_equal(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "resolved.yaml"
    write_config(config, path)
    assert read_config(path) == config
    assert list(read_config(path).sparsity.densities) == list(config.sparsity.densities), "the first pattern decides"
    assert yaml.safe_load(path.read_bytes()) == to_dict(config), "YAML 1.1 readers read the same"


@settings(max_examples=300)
@given(text=st.sampled_from(AMBIGUOUS) | st.text())
def test_any_text_survives_writing(text: str) -> None:
    assert load(dump([text])) == yaml.safe_load(dump([text])) == [text]


def test_the_written_form_is_complete_and_in_the_order_of_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    write_config(Config(run_dir="a", seed=3), path)
    lines = path.read_text().splitlines()
    assert lines[:4] == ["run_dir: a", "seed: 3", "model:", "  name: deit_tiny_patch16_224"]
    assert "  betas: [0.9, 0.999]" in lines
    assert "  eps: 1.0e-08" in lines
    assert sum(":" in line for line in lines) == len(hints_of(Config)) + len(sections_of(Config))


def sections_of(section: type) -> list[type]:
    inner = [hint for hint in get_type_hints(section).values() if dataclasses.is_dataclass(hint)]
    return [found for hint in inner for found in (hint, *sections_of(hint))]


def test_to_dict_holds_plain_values_only() -> None:
    def leaves(value: object) -> list[object]:
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(to_dict(Config(run_dir="a")))} <= {int, float, bool, str, type(None)}


def test_to_dict_takes_one_section_too() -> None:
    @dataclass(frozen=True)
    class Pair:
        values: tuple[float, float] = (1.0, 2.0)

    assert to_dict(Pair()) == {"values": [1.0, 2.0]}
