"""A :class:`~svite_scale.config.schema.Config` from a YAML file and ``dotted.key=value`` overrides, and back to YAML.

Every mistake is one :class:`~svite_scale.errors.ConfigError` that names the field, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_origin

from svite_scale.config.plain_yaml import PlainYamlError, dump, load
from svite_scale.config.schema import Config
from svite_scale.errors import ConfigError
from svite_scale.options import field_hints, in_section, kind_of

Section = TypeVar("Section")

NEAR = 0.6
"""Likeness from which a known key is worth proposing for an unknown one."""


def read_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a run's config; :func:`~svite_scale.config.validate.validate` comes after, once the world size is known.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` each, the value in YAML; they win over the file, and a later one over an earlier one.

    Raises:
        ConfigError: the file can't be read, or a key or a value isn't what a Config holds.
    """
    path = Path(path)
    return make_config(read_mapping(path), overrides, str(path))


def make_config(mapping: Mapping[Any, Any], overrides: Sequence[str], source: str) -> Config:
    """Makes a run's config.

    Args:
        mapping: values by key, nested.
        overrides: as for :func:`read_config`.
        source: of the mapping, for the error.

    Raises:
        ConfigError: a key or a value isn't what a Config holds.
    """
    schema = leaf_hints(Config)
    values = dict(leaves(mapping, schema))
    for override in overrides:
        key, value = read_override(override, schema)
        values[key] = value
    if "run_dir" not in values:
        raise ConfigError("run_dir", None, "is missing and has no default", f"add it to {source} or give run_dir=VALUE")
    return build(Config, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config, or one section of it, as plain dicts, lists and scalars."""
    return {field.name: plain(getattr(config, field.name)) for field in fields(config)}


def flatten_config(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Returns what :func:`to_dict` gave, by dotted names; a field that is itself a mapping stays whole."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in field_names():
            flat |= flatten_config(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def to_yaml(config: Config) -> str:
    """Returns the whole config as YAML in ASCII, which :func:`read_config` reads back equal."""
    return dump(to_dict(config))


def plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def leaf_hints(section: type, prefix: str = "") -> dict[str, Any]:
    """Returns the type hint of every field that is no section, by dotted name."""
    hints: dict[str, Any] = {}
    for name, hint in field_hints(section).items():
        if is_dataclass(hint):
            hints.update(leaf_hints(hint, f"{prefix}{name}."))  # type: ignore[arg-type]
        else:
            hints[prefix + name] = hint
    return hints


@cache
def field_names() -> frozenset[str]:
    """Dotted names of all fields of a Config that are no sections."""
    return frozenset(leaf_hints(Config))


def is_section(key: str, schema: Mapping[str, Any]) -> bool:
    return any(known.startswith(f"{key}.") for known in schema)


def read_mapping(path: Path) -> dict[Any, Any]:
    """Reads the file's top-level mapping.

    Raises:
        ConfigError: no such file, no valid YAML, or no mapping.
    """
    name = str(path)
    try:
        document = load(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError("config", name, "is no file", nearest_file(path)) from error
    except OSError as error:
        raise ConfigError("config", name, f"can't be read ({error.strerror})", "name a readable YAML file") from error
    except PlainYamlError as error:
        raise ConfigError("config", name, f"is no valid YAML: {error}", "mend the file there") from error
    if document is None:
        raise ConfigError("config", name, "is empty", "write at least run_dir: FOLDER")
    if not isinstance(document, dict):
        raise ConfigError("config", name, f"holds {document!r} and no keys", "write key: value lines")
    return document


def nearest_file(path: Path) -> str:
    """Returns the remedy for a missing file: the YAML file of the same folder that was probably meant."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either, check the path"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    if not names:
        return f"no YAML file is in {path.parent}, check the path"
    return f"the nearest is {path.with_name(max(names, key=lambda name: likeness(name, path.name)))}"


def leaves(mapping: Mapping[Any, Any], schema: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the dotted keys and the values of a nested mapping.

    Raises:
        ConfigError: a key is unknown, or a section is no mapping.
    """
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if is_section(key, schema):
            if not isinstance(value, dict):
                raise section_error(key, value, schema)
            yield from leaves(value, schema, f"{key}.")
        elif key in schema:
            yield key, value
        else:
            raise unknown_key(*first_leaf(key, value), schema)


def first_leaf(key: str, value: object) -> tuple[str, object]:
    """Returns the first key within an unknown section, and its value: they show better what was meant."""
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key, value


def read_override(override: str, schema: Mapping[str, Any]) -> tuple[str, object]:
    """Splits ``dotted.key=value`` and reads the value as YAML.

    Raises:
        ConfigError: no ``=``, an unknown key, a section, or a value that isn't YAML.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError("override", override, "has no '='", "write dotted.key=value")
    if is_section(key, schema):
        raise section_error(key, text, schema)
    if key not in schema:
        raise unknown_key(key, text, schema)
    try:
        return key, load(text)
    except PlainYamlError as error:
        raise ConfigError(key, text, f"is no valid YAML: {error}", "put text with special characters in quotes") from error


def section_error(key: str, value: object, schema: Mapping[str, Any]) -> ConfigError:
    known = ", ".join(sorted(name for name in schema if name.startswith(f"{key}.")))
    return ConfigError(key, value, "is a section and takes no value", f"set its fields: {known}")


def unknown_key(key: str, value: object, schema: Mapping[str, Any]) -> ConfigError:
    """Returns an error that names the nearest known key of any section; if none is near, the known keys of the section."""
    mapping = next(
        (known for known in schema if key.startswith(f"{known}.") and get_origin(kind_of(schema[known])[0]) is dict), None
    )
    if mapping is not None:
        return ConfigError(key, value, "is one entry of a mapping", f"give all of it: {mapping}='{{KEY: VALUE, ...}}'")
    nearest = max(schema, key=lambda known: key_likeness(key, known))
    if key_likeness(key, nearest) >= NEAR:
        return ConfigError(key, value, "is no known key", f"the nearest is {nearest}")
    section = key.rpartition(".")[0]
    known = [name for name in schema if name.startswith(f"{section}.")] or sorted({name.split(".")[0] for name in schema})
    return ConfigError(key, value, "is no known key", f"known are {', '.join(known)}")


def key_likeness(one: str, other: str) -> float:
    """Returns how alike two dotted keys are, 0 to 1. The last part counts for half: so a key in the wrong section is found."""
    return (likeness(one, other) + likeness(one.rpartition(".")[2], other.rpartition(".")[2])) / 2


def likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def build(section: type[Section], values: Mapping[str, object], name: str = "") -> Section:
    """Builds a section from its dotted values; fields without one keep their defaults.

    Args:
        section: the class.
        values: by dotted name, for all sections.
        name: the section's own dotted name; empty for the whole config.

    Raises:
        ConfigError: a value is wrong.
    """
    prefix = f"{name}." if name else ""
    arguments: dict[str, object] = {}
    for key, hint in field_hints(section).items():
        if is_dataclass(hint):
            arguments[key] = build(hint, values, prefix + key)  # type: ignore[arg-type]
        elif prefix + key in values:
            arguments[key] = values[prefix + key]
    with in_section(name):
        return section(**arguments)
