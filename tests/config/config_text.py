"""Config files for the tests of the reader, and the one error that reading one gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from svite_scale.config.load import read_config
from svite_scale.errors import ConfigError
from svite_scale.options import field_hints

MINIMAL = "run_dir: runs/a\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_file(key: str, text: str) -> str:
    """YAML for one dotted key beside the required one."""
    section, _, name = key.rpartition(".")
    head = "" if key == "run_dir" else MINIMAL
    return f"{head}{section}:\n  {name}: {text}\n" if section else f"{head}{name}: {text}\n"


def error_of(path: Path, overrides: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_config(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def hints_of(section: type, prefix: str = "") -> dict[str, Any]:
    """The type hint of every field that is no section, by dotted name."""
    hints: dict[str, Any] = {}
    for name, hint in field_hints(section).items():
        hints.update(hints_of(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint})
    return hints
