"""The decorator of option classes: dataclasses whose values are checked when they are made, each mistake reported in one line.

A component declares its options once, beside itself::

    @options
    class DropSchedule:
        stop_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8

A user's loop makes them directly. A config composes them, see :mod:`svite_scale.config.schema`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from svite_scale.errors import ConfigError, OptionError

Options = TypeVar("Options")

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
BOUNDS = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below"}
OUTSIDE = {"ge": "below", "gt": "not above", "le": "above", "lt": "not below"}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def options(cls: type[Options]) -> type[Options]:
    """Makes a frozen, keyword-only dataclass that checks types and bounds when it is made.

    An int serves as a float, a list as a tuple, and numpy's numbers as Python's; nothing else is converted. ``__post_init__``
    checks what no single field can tell, and raises :class:`~svite_scale.errors.OptionError`, as the class itself does.
    """
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)(cls)
    check = made.__init__

    @wraps(check)
    def __init__(self: Any, **values: Any) -> None:
        try:
            check(self, **{name: _plain(value) for name, value in values.items()})
        except ValidationError as error:
            raise _first_mistake(made, values, error) from None

    made.__init__ = __init__
    return made


def whole_choice(value: object) -> object:
    """Refuses True and 1.0 where a Literal holds 1; for ``Annotated[Literal[1, 2], BeforeValidator(whole_choice)]``."""
    if type(value) is not int:
        raise ValueError("is no int")
    return value


def options_of(kind: type, source: object) -> dict[str, Any]:
    """Returns the values of those fields of ``source`` that the options class ``kind`` has, by name."""
    return {each.name: getattr(source, each.name) for each in fields(kind)}


def refuse_unused(source: object, name: str, cause: str) -> None:
    """Refuses an option that has no effect, unless it is at its default.

    Raises:
        OptionError: names the option, and the cause.
    """
    value = getattr(source, name)
    if value != getattr(type(source), name):
        raise OptionError(name, list(value) if isinstance(value, tuple) else value, cause, "leave it out")


@contextmanager
def in_section(name: str) -> Iterator[None]:
    """Raises a ConfigError, with the dotted name that an option has in the section ``name``, in the place of an OptionError."""
    try:
        yield
    except OptionError as error:
        dotted = f"{name}.{error.field}" if name else error.field
        raise ConfigError(dotted, error.value, error.problem, error.remedy) from error


def field_hints(kind: Any) -> dict[str, Any]:
    """Returns the resolved type hint of each field of a dataclass, with its bounds, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in fields(kind)}


def kind_of(hint: Any) -> tuple[Any, dict[str, float]]:
    """Takes ``Annotated`` apart into the type and its bounds, by pydantic's names of them: ge, gt, le, lt."""
    if get_origin(hint) is not Annotated:
        return hint, {}
    kind, *notes = get_args(hint)
    limits = [limit for note in notes for limit in getattr(note, "metadata", ())]
    return kind, {name: getattr(limit, name) for name in BOUNDS for limit in limits if hasattr(limit, name)}


def describe(hint: Any, *, bounds: bool = True) -> str:
    """Says in words what an option takes, with or without its bounds."""
    kind, limits = kind_of(hint)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        words = " or ".join(describe(part, bounds=bounds) for part in inner if part is not NoneType)
        return words + _limits(limits, bounds) + (" or null" if NoneType in inner else "")
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin is tuple:
        length = "" if inner[-1] is Ellipsis else f" of {len(inner)}"
        return f"a list{length}, each entry {describe(inner[0], bounds=bounds)}"
    if origin is dict:
        return f"a mapping of text, each entry {describe(inner[1], bounds=bounds)}"
    return KINDS.get(kind, f"a {kind.__name__}") + _limits(limits, bounds)


def _limits(limits: Mapping[str, float], bounds: bool) -> str:
    return " " + " and ".join(f"{BOUNDS[name]} {limit}" for name, limit in limits.items()) if limits and bounds else ""


def _plain(value: Any) -> Any:
    """Returns lists as tuples, and numbers of other libraries as Python's."""
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _first_mistake(kind: type, values: Mapping[str, Any], error: ValidationError) -> OptionError:
    """The first of pydantic's errors, as one line."""
    mistakes = error.errors(include_url=False)
    first = next((each for each in mistakes if each["type"] == "unexpected_keyword_argument"), mistakes[0])
    reason, place, found = first["type"], first["loc"], first["input"]
    if not place:  # from __post_init__
        cause = first["ctx"]["error"]
        assert isinstance(cause, OptionError), cause
        return cause
    name, hints = str(place[0]), field_hints(kind)
    if name not in hints:
        near = get_close_matches(name, hints, n=1)
        remedy = f"the nearest is {near[0]}" if near else f"known are {', '.join(hints)}"
        return OptionError(name, values[name], f"is no option of {kind.__name__}", remedy)
    if name not in values:
        return OptionError(name, None, "is missing and has no default", f"give {name}=VALUE")
    hint, value = hints[name], values[name]
    if get_origin(kind_of(hint)[0]) is dict and len(place) > 1:
        if place[-1] == "[key]":
            return OptionError(name, value, f"has a key that is not text, {place[1]!r}", "put it in quotes")
        name, value, hint = f"{name}[{place[1]!r}]", value[place[1]], get_args(kind_of(hint)[0])[1]
    bound = next((limit for limit in OUTSIDE if limit in first.get("ctx", {})), None)
    if bound is not None:
        problem = f"is {OUTSIDE[bound]} {first['ctx'][bound]}"
    elif reason == "finite_number" or (reason == "float_type" and type(found) is int):
        problem = "is not finite"
    else:
        problem = f"is not {describe(hint, bounds=False)}"
    is_text = kind_of(hint)[0] in (str, str | None)
    return OptionError(name, value, problem, f"use {describe(hint)}{', in quotes if need be' if is_text else ''}")
