"""The decorator of option classes: what it converts, what it refuses, and that its classes stay ordinary dataclasses."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import field
from typing import Annotated, Literal, get_args, get_type_hints

import numpy as np
import pytest
from pydantic import Field

from svite_scale.errors import ConfigError, OptionError
from svite_scale.models.options import ModelConfig, TokensConfig
from svite_scale.options import in_section, options, options_of
from svite_scale.sparsity.allocation.distributions import DISTRIBUTIONS
from svite_scale.sparsity.options import Allocation, DropSchedule, TopologyOptions
from svite_scale.sparsity.topology.schedule import DROP_SCHEDULES, UpdateSchedule
from svite_scale.train.optimizer import OPTIMIZERS
from svite_scale.train.options import OptimizerConfig


@options
class Limits:
    """An option of each kind."""

    size: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    names: tuple[str, ...] = ()
    on: bool = False
    by_name: dict[str, int] = field(default_factory=dict)


def test_numbers_of_numpy_become_those_of_python() -> None:
    limits = Limits(size=np.int64(3), rate=np.float32(0.25))  # type: ignore[arg-type]
    assert (type(limits.size), limits.size) == (int, 3)
    assert (type(limits.rate), limits.rate) == (float, 0.25)


def test_lists_become_tuples_and_ints_become_floats() -> None:
    assert Limits(size=1, names=["a", "b"]).names == ("a", "b")  # type: ignore[arg-type]
    temperature = TokensConfig(keep=0.5, signal="paper", temperature=2).temperature
    assert (type(temperature), temperature) == (float, 2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": True}, "size = True: is not a whole number; use a whole number of at least 1"),
        ({"size": 2.0}, "size = 2.0: is not a whole number; use a whole number of at least 1"),
        ({"size": "2"}, "size = '2': is not a whole number; use a whole number of at least 1"),
        ({"size": 0}, "size = 0: is below 1; use a whole number of at least 1"),
        ({"size": 1, "rate": 1}, "rate = 1: is not below 1.0; use a number above 0.0 and below 1.0"),
        ({"size": 1, "rate": float("nan")}, "rate = nan: is not finite; use a number above 0.0 and below 1.0"),
        ({"size": 1, "names": "ab"}, "names = 'ab': is not a list, each entry text; use a list, each entry text"),
        ({"size": 1, "on": 1}, "on = 1: is not true or false; use true or false"),
        ({"size": 1, "by_name": {"a": 1.5}}, "by_name['a'] = 1.5: is not a whole number; use a whole number"),
        ({"size": 1, "by_name": {3: 1}}, "by_name = {3: 1}: has a key that is not text, 3; put it in quotes"),
        ({"size": 1, "rates": 0.5}, "rates = 0.5: is no option of Limits; the nearest is rate"),
        ({"sise": 1}, "sise = 1: is no option of Limits; the nearest is size"),
        ({"size": 1, "q": 2}, "q = 2: is no option of Limits; known are size, rate, names, on, by_name"),
        ({}, "size = None: is missing and has no default; give size=VALUE"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_a_remedy(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Limits(**given)  # type: ignore[arg-type]
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_an_option_in_a_section_of_a_config_has_a_dotted_name() -> None:
    with pytest.raises(ConfigError) as caught, in_section("train.limits"):
        Limits(size=0)
    assert str(caught.value) == "train.limits.size = 0: is below 1; use a whole number of at least 1"


def test_option_classes_are_frozen_dataclasses_that_can_be_pickled_and_hashed() -> None:
    model = ModelConfig(depth=3)
    assert dataclasses.replace(model, depth=4).depth == 4
    assert dataclasses.asdict(model)["depth"] == 3
    assert pickle.loads(pickle.dumps(model)) == model
    assert hash(model) == hash(ModelConfig(depth=3))
    assert hash(TopologyOptions(optimizer_state={"a": "weight"})) == hash(TopologyOptions())
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.depth = 5  # type: ignore[misc]
    with pytest.raises(OptionError):
        dataclasses.replace(model, depth=0)


def test_options_of_takes_the_fields_that_a_class_has() -> None:
    schedule = UpdateSchedule(total_steps=10, update_every=2, drop_fraction=0.4)
    taken = options_of(DropSchedule, schedule)
    assert taken.keys() == {each.name for each in dataclasses.fields(DropSchedule)}
    assert DropSchedule(**taken) == DropSchedule(drop_fraction=0.4)


@pytest.mark.parametrize(
    ("kind", "name", "table"),
    [
        (Allocation, "distribution", DISTRIBUTIONS),
        (DropSchedule, "drop_schedule", DROP_SCHEDULES),
        (OptimizerConfig, "name", OPTIMIZERS),
    ],
)
def test_each_choice_has_its_function(kind: type, name: str, table: dict[str, object]) -> None:
    choices = get_type_hints(kind)[name]
    assert choices == Literal[tuple(table)]  # type: ignore[comparison-overlap]
    assert set(get_args(choices)) == set(table)
