"""A written config reads back equal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svite_scale.config.load import build, read_config, to_dict, to_yaml
from svite_scale.config.plain_yaml import dump, load
from svite_scale.config.schema import Config
from svite_scale.errors import ConfigError
from svite_scale.options import field_hints, kind_of
from tests.config.config_text import hints_of

AMBIGUOUS = ["1e5", "5E-4", "0x10", "010", "1:30", "yes", "~", "<<", "=", "2026-01-31", "1.", ".5", "-.inf"]
HINTS = hints_of(Config)


def values_of(hint: Any, outer: dict[str, float] | None = None) -> st.SearchStrategy[Any]:
    """Values of a field as YAML holds them, from its hint; ``outer`` are the bounds of a union that it is part of."""
    kind, bounds = kind_of(hint)
    origin, inner, bounds = get_origin(kind), get_args(kind), bounds or outer or {}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if origin in (Union, UnionType):
        parts = [part for part in inner if get_origin(part) is not Annotated]  # a Method is no YAML
        return st.one_of(*(values_of(part, bounds) for part in parts))
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is dict:
        return st.dictionaries(st.sampled_from(AMBIGUOUS) | st.text(max_size=20), values_of(inner[1]), max_size=3)
    if origin is tuple:
        least, most = (0, 4) if inner[-1] is Ellipsis else (len(inner), len(inner))
        return st.lists(values_of(inner[0]), min_size=least, max_size=most)
    if kind is float:
        limits = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
        return st.floats(low, high, allow_nan=False, allow_infinity=False, **limits)
    return {int: st.integers(low, high), bool: st.booleans(), str: st.text(max_size=20), NoneType: st.none()}[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Configs with up to 30 fields drawn, but for those that another one forbids."""
    values: dict[str, object] = {"run_dir": draw(st.text(max_size=20))}
    for key in draw(st.lists(st.sampled_from(list(HINTS)), max_size=30, unique=True)):
        drawn = values | {key: draw(values_of(HINTS[key]))}
        try:
            build(Config, drawn)
        except ConfigError:
            continue
        values = drawn
    return build(Config, values)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(config=configs())
def test_a_written_config_reads_back_equal(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="ascii")
    assert read_config(path) == config
    assert list(read_config(path).sparsity.densities) == list(config.sparsity.densities), "the first pattern decides"
    assert yaml.safe_load(path.read_bytes()) == to_dict(config), "YAML 1.1 readers read the same"


@settings(max_examples=300)
@given(text=st.sampled_from(AMBIGUOUS) | st.text())
def test_any_text_survives_writing(text: str) -> None:
    assert load(dump([text])) == yaml.safe_load(dump([text])) == [text]


def test_the_written_form_is_complete_and_in_the_order_of_the_schema() -> None:
    lines = to_yaml(Config(run_dir="a", seed=3)).splitlines()
    assert lines[:4] == ["run_dir: a", "seed: 3", "model:", "  name: deit_tiny_patch16_224"]
    assert "  betas: [0.9, 0.999]" in lines
    assert "  eps: 1.0e-08" in lines
    assert sum(":" in line for line in lines) == len(hints_of(Config)) + len(sections_of(Config))


def sections_of(section: type) -> list[type]:
    inner = [hint for hint in field_hints(section).values() if dataclasses.is_dataclass(hint)]
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
