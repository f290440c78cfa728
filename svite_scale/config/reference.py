"""The page docs/configuration.md, made from the option classes: ``python -m svite_scale.config.reference`` prints it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any

from svite_scale.config.load import plain
from svite_scale.config.plain_yaml import dump
from svite_scale.config.schema import Config
from svite_scale.options import describe, field_hints

COMMAND = "python -m svite_scale.config.reference > docs/configuration.md"

PAGES = {
    "model": ["models.md"],
    "sparsity": ["sparsity.md", "methods.md"],
    "sparsity.structured": ["structure.md"],
    "sparsity.tokens": ["tokens.md"],
    "data": ["data.md"],
    "data.augment": ["data.md#transforms"],
    "distillation": ["distillation.md"],
    "optimizer": ["methods.md#optimizers"],
    "train": ["training.md"],
    "checkpoint": ["checkpoints.md"],
    "parallel": ["training.md#engines-and-launchers"],
    "guard": ["preemption.md"],
    "tracking": ["operations.md"],
}
"""By section, the pages that say more about it. A section needn't have one."""

BEGIN = f"""# Every key of a config

<!-- Made by `{COMMAND}` from the option classes. Change a key there, not here. -->

A config is a YAML file of the sections and keys of this page. A key that it leaves out has its default. On the command line,
`section.key=value` replaces a value ([training.md](training.md#the-config)).
"""


def reference() -> str:
    """Returns the page: a table of the sections, then one table of the keys of each section, in the order of the schema."""
    sections = list(walk(Config))
    overview = [[f"[`{name}`](#{name.replace('.', '')})", meaning(kind), links(name)] for name, kind in sections[1:]]
    parts = [BEGIN, table(["section", "what it sets", "pages"], overview), "## Outside of all sections\n", keys(Config)]
    for name, kind in sections[1:]:
        parts += [f"## `{name}`\n", f"{meaning(kind)}\n", keys(kind)]
    return "\n".join(parts)


def walk(kind: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the class of a section, and then of those in it."""
    yield name, kind
    for key, hint in field_hints(kind).items():
        if is_dataclass(hint):
            yield from walk(hint, f"{name}.{key}" if name else key)


def links(name: str) -> str:
    """Returns links to the pages of a section."""
    return ", ".join(f"[{page.partition('#')[0]}]({page})" for page in PAGES.get(name, []))


def keys(kind: Any) -> str:
    """Returns the table of a section's own keys."""
    hints, meanings = field_hints(kind), field_meanings(kind)
    rows = [
        [f"`{each.name}`", default(each), describe(hints[each.name]), markdown(meanings.get(each.name, ""))]
        for each in fields(kind)
        if not is_dataclass(hints[each.name])
    ]
    return table(["key", "default", "takes", "meaning"], rows)


def default(field: Any) -> str:
    """Returns a field's default as YAML, in code style."""
    if field.default is MISSING and field.default_factory is MISSING:
        return "none; it must be given"
    value = field.default_factory() if field.default is MISSING else field.default
    return f"`{dump({'key': plain(value)}).removeprefix('key: ').strip()}`"


def meaning(kind: Any) -> str:
    """Returns the docstring of an options class, as Markdown."""
    return markdown(inspect.getdoc(kind) or "")


def field_meanings(kind: Any) -> dict[str, str]:
    """Returns the text that stands below each field in the source of an options class or of one that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = ast.literal_eval(below.value)
    return found


def markdown(docstring: str) -> str:
    """Returns a docstring on one line, with its code and references in Markdown's code style."""
    line = re.sub(r":\w+:`(?:[^`]*[.~])?(\w+)`", r"``\1``", " ".join(docstring.split()))
    return line.replace("``", "`")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    print(reference(), end="")
