"""The layers of the package: which part may import which."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "svite_scale"
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "runtime": {"errors"},
    "sparsity": {"errors", "options"},
    "tracking": {"errors", "options", "runtime"},
    "data": {"errors", "options", "runtime", "tracking"},
    "models": {"errors", "options", "sparsity"},
    "engines": {"errors", "options", "sparsity"},
    "config": {"errors", "options", "sparsity", "models"},
    "cost": {"errors", "options", "config", "sparsity", "models"},
    "checkpoint": {"errors", "options", "runtime", "config", "sparsity", "engines"},
    "train": {
        "errors",
        "options",
        "runtime",
        "config",
        "sparsity",
        "data",
        "models",
        "engines",
        "tracking",
        "cost",
        "checkpoint",
    },
    "saved_run": {"errors", "config", "data", "models", "tracking", "checkpoint"},
    "export": {
        "errors",
        "options",
        "runtime",
        "config",
        "sparsity",
        "data",
        "models",
        "tracking",
        "cost",
        "checkpoint",
        "train",
        "saved_run",
    },
    "evaluation": {
        "errors",
        "options",
        "runtime",
        "config",
        "sparsity",
        "data",
        "models",
        "tracking",
        "cost",
        "checkpoint",
        "train",
        "saved_run",
        "export",
    },
    "report": {"errors", "config", "sparsity", "data", "models", "tracking", "cost", "checkpoint", "saved_run", "export"},
    "publish": {"errors", "config", "models", "tracking", "saved_run", "export", "report"},
    "": {"errors", "sparsity", "models", "engines", "cost", "train"},
}
"""By part of the package ("" is its __init__), the other parts that it may import. Besides, all may import the options of
every part, which import nothing but each other: so the config is made of them, though most components stand above it."""

OPTIONS_MAY_IMPORT = {"errors", "options"}
LIGHT = {"pydantic", "typing_extensions"}

ROOMS_OF_DATA = {
    "options": set(),
    "remote": {"options"},
    "format": {"options", "remote"},
    "make": {"format"},
    "": {"options", "remote", "format"},
}
"""By room of data ("" holds what reads shards), the other rooms of it that it may import."""

NOT_EVEN_LATE = {
    "runtime": {"timm", "deepspeed", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "sparsity": {"timm", "deepspeed", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "config": {"timm", "deepspeed", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "data": {"deepspeed", "accelerate", "mlflow", "matplotlib"},
    "models": {"deepspeed", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "engines": {"timm", "mlflow", "webdataset", "matplotlib"},
    "tracking": {"timm", "deepspeed", "accelerate", "webdataset", "matplotlib"},
    "checkpoint": {"timm", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "cost": {"deepspeed", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "train": {"matplotlib"},
    "export": {"deepspeed", "accelerate", "mlflow", "webdataset", "matplotlib"},
    "evaluation": {"deepspeed", "accelerate", "mlflow", "webdataset"},
    "report": {"deepspeed", "accelerate", "mlflow", "webdataset"},
}
"""Libraries that a part knows nothing of."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a source file belongs to."""
    inner = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if inner == ("__init__",) else inner[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import absolutely"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    for line, name in imported(path):
        library, _, inner = name.partition(".")
        assert library not in NOT_EVEN_LATE.get(part, ()), f"{path}:{line}: {part} knows nothing of {library}"
        if library == "svite_scale":
            target = inner.partition(".")[0]
            allowed = target == part or target in MAY_IMPORT[part] or is_options(name)
            assert allowed, f"{path}:{line}: {part} may not import {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("options.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_options_import_only_errors_and_options(path: Path) -> None:
    for line, name in imported(path):
        library, _, inner = name.partition(".")
        if library == "svite_scale":
            allowed = inner.partition(".")[0] in OPTIONS_MAY_IMPORT or is_options(name)
        else:
            allowed = library in LIGHT or library in sys.stdlib_module_names
        assert allowed, f"{path}:{line}: options may not import {name}"


def is_options(name: str) -> bool:
    """Whether a dotted name is in the options module of a part."""
    return re.fullmatch(r"svite_scale\.\w+\.options(\.\w+)?", name) is not None


def room_of(inner: list[str]) -> str:
    """The room of data that a path within it, or a dotted name, belongs to."""
    return inner[0] if inner and inner[0] in ROOMS_OF_DATA else ""


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if part_of(path) == "data"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_within_data_go_downward(path: Path) -> None:
    room = room_of(list(path.relative_to(PACKAGE / "data").with_suffix("").parts))
    for line, name in imported(path):
        library, _, inner = name.partition("svite_scale.data.")
        target = room_of(inner.split("."))
        allowed = library or target in ROOMS_OF_DATA[room] | {room} or is_options(name)
        assert allowed, f"{path}:{line}: {room or 'data'} may not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_making_shards_is_imported_by_its_command_only(path: Path) -> None:
    if not path.is_relative_to(PACKAGE / "data" / "make"):
        assert not [name for _, name in imported(path) if name.startswith("svite_scale.data.make")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package_imports_neither_tests_nor_commands(path: Path) -> None:
    outside = {"tests", "launch", "examples", "digits", "benchmarks", "pytest"}
    assert not {name.partition(".")[0] for _, name in imported(path)} & outside


@pytest.mark.parametrize("folder", ["launch", "examples"])
def test_commands_and_examples_shadow_no_package(folder: str) -> None:
    """Its folder comes first on sys.path of a run, so a file there named like a library would hide it."""
    entries = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()]
    beside = {path.stem for path in entries}
    assert beside
    libraries = {name.partition(".")[0] for name in metadata.packages_distributions()}
    assert not beside & (libraries | sys.stdlib_module_names)
