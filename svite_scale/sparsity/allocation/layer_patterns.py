"""Patterns on layer names, as a shell matches file names: ``*`` is anything, dots included, ``?`` one character, ``[12]`` one
of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from svite_scale.errors import SparsifyError


def matching_layers(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Returns the layers that at least one of the ``keep_dense`` patterns matches.

    Raises:
        SparsifyError: a pattern matches none.
    """
    names, matched = list(names), set[str]()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise SparsifyError("keep_dense", pattern, "matches no prunable layer", f"use names such as {_example(names)}")
        matched |= found
    return matched


def densities_by_pattern(names: Iterable[str], densities: Mapping[str, float]) -> dict[str, float]:
    """Returns each layer's density by the first pattern that matches it.

    Args:
        names: of the layers.
        densities: by pattern, each in (0, 1].

    Raises:
        SparsifyError: no pattern matches a layer, or a pattern decides no layer.
    """
    names = list(names)
    deciding: dict[str, str] = {}
    for name in names:
        first = next((pattern for pattern in densities if fnmatchcase(name, pattern)), None)
        if first is None:
            raise SparsifyError(
                "densities", dict(densities), f"no pattern matches layer {name}", 'add "*": DENSITY at the end for all others'
            )
        deciding[name] = first
    for pattern in densities:
        if pattern not in deciding.values():
            raise _idle(pattern, densities[pattern], names)
    return {name: densities[pattern] for name, pattern in deciding.items()}


def _idle(pattern: str, density: float, names: list[str]) -> SparsifyError:
    """Returns the error about a pattern that decides no layer."""
    if any(fnmatchcase(name, pattern) for name in names):
        problem, remedy = "decides no layer, since earlier patterns match all of its layers", "put it first, or leave it out"
    else:
        problem, remedy = "decides no layer, since it matches none that is to be sparse", f"use names such as {_example(names)}"
    return SparsifyError("densities", {pattern: density}, problem, remedy)


def _example(names: list[str]) -> str:
    """Returns a layer's name from the middle of the model, where names repeat."""
    return names[len(names) // 2]
