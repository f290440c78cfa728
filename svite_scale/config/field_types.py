"""One value of a config field, checked against the field's type hint and bounds.

Knows int, float, bool, str, ``X | None``, Literal, tuple, dict[str, float] and Annotated with
:class:`svite_scale.config.schema.Bounds`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from svite_scale.config.schema import Bounds
from svite_scale.errors import ConfigError

Section = TypeVar("Section")

MAPPING = dict[str, float]
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read_value(field: str, hint: Any, value: object) -> object:
    """Returns ``value`` as the type that ``hint`` asks for: ints become floats, lists become tuples.

    Args:
        field: dotted name of the field, for the message.
        hint: its resolved type hint.
        value: what the YAML says.

    Raises:
        ConfigError: wrong type, not finite, or out of bounds.
        TypeError: ``hint`` is of a kind that this module doesn't know.
    """
    bare, bounds = split_bounds(hint)
    kind, nullable = split_null(bare)
    if value is None and nullable:
        return None
    if kind == MAPPING:
        return read_mapping(field, hint, value)
    typed = convert(kind, value)
    problem = f"is not {describe(bare)}" if typed is None else range_problem(typed, bounds)
    if problem is not None:
        quotes = ", in quotes if need be" if kind is str else ""
        raise ConfigError(field, value, problem, f"use {describe(hint)}{quotes}")
    return typed


def read_section(name: str, section: Section) -> Section:
    """Returns a section of a config that was filled in by hand, with the values that a file would have given.

    Args:
        name: dotted name of the section, for the message.
        section: a dataclass without sections in it.

    Raises:
        ConfigError: a value of the wrong type, not finite, or out of bounds.
    """
    values = {}
    for field, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, field)
        values[field] = read_value(f"{name}.{field}", hint, list(value) if isinstance(value, tuple) else value)
    return replace(section, **values)  # type: ignore[type-var]


def read_mapping(field: str, hint: Any, value: object) -> dict[str, object]:
    """Returns a mapping of text to numbers; the bounds are those of each number, and messages name the entry."""
    if not isinstance(value, dict):
        raise ConfigError(field, value, f"is not {describe_kind(MAPPING)}", f"use {describe(hint)}")
    bounds = split_bounds(hint)[1]
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(field, value, f"has a key that is not text, {key!r}", "put it in quotes")
    return {key: read_value(f"{field}[{key!r}]", Annotated[float, bounds], item) for key, item in value.items()}


def split_bounds(hint: Any) -> tuple[Any, Bounds]:
    """Takes Annotated apart; a hint without bounds has open ones."""
    if get_origin(hint) is not Annotated:
        return hint, Bounds()
    bare, *notes = get_args(hint)
    return bare, next((note for note in notes if isinstance(note, Bounds)), Bounds())


def split_null(hint: Any) -> tuple[Any, bool]:
    """Takes ``X | None`` apart into X and whether None is allowed."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"config fields hold one type or null, not {hint}")
    return kinds[0], len(get_args(hint)) == 2


def convert(kind: Any, value: object) -> object:
    """Returns ``value`` as ``kind``, or None where it isn't one."""
    origin = get_origin(kind)
    if origin is Literal:
        return next((choice for choice in get_args(kind) if type(choice) is type(value) and choice == value), None)
    if origin is tuple:
        return convert_tuple(get_args(kind), value)
    if kind is float:
        return as_float(value)
    if kind in NAMES:
        return value if type(value) is kind else None
    raise TypeError(f"config fields can't hold {kind}")


def as_float(value: object) -> float | int | None:
    """A float from a float or an int; an int that no float can hold stays, for the range check to refuse."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if is_finite(value) else value


def convert_tuple(kinds: tuple[Any, ...], value: object) -> tuple[object, ...] | None:
    if not isinstance(value, list):
        return None
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    items = tuple(convert(kind, item) for kind, item in zip(kinds, value, strict=False))
    fits = len(kinds) == len(value) and None not in items
    return items if fits else None


def is_finite(number: int | float) -> bool:
    """Whether a float can hold it; NaN fails every comparison."""
    return abs(number) <= sys.float_info.max


def range_problem(value: object, bounds: Bounds) -> str | None:
    """What is wrong with the size of a number, or of the numbers in a tuple; None if nothing is."""
    if isinstance(value, tuple):
        return next((problem for item in value if (problem := range_problem(item, bounds))), None)
    if isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
        return None
    if not is_finite(value):
        return "is not finite"
    if bounds.low is not None and value < bounds.low:
        return f"is below {bounds.low}"
    if bounds.above is not None and value <= bounds.above:
        return f"is not above {bounds.above}"
    if bounds.high is not None and value > bounds.high:
        return f"is above {bounds.high}"
    return None


def describe(hint: Any) -> str:
    """Says in words what a field takes, bounds included."""
    bare, bounds = split_bounds(hint)
    kind, nullable = split_null(bare)
    return describe_kind(kind) + describe_bounds(bounds) + (" or null" if nullable else "")


def describe_kind(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list, each entry {describe_kind(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each entry {describe_kind(args[0])}"
    if kind == MAPPING:
        return f"a mapping of text, each entry {NAMES[float]}"
    return NAMES[kind]


def describe_bounds(bounds: Bounds) -> str:
    words = (("of at least", bounds.low), ("above", bounds.above), ("up to", bounds.high))
    said = [f"{word} {limit}" for word, limit in words if limit is not None]
    return " " + " and ".join(said) if said else ""
