"""YAML read as people mean it: ``5e-4`` is a number, ``2026-01-31`` and ``no`` are text, a key stands once.

YAML 1.1, which PyYAML implements, reads ``5e-4`` as text, ``010`` as eight, ``1:30`` as ninety and ``no`` as false, and keeps
the last of two equal keys without a word. The loader here knows null, true, false, decimal whole numbers and decimal floats;
all else is text. What :func:`dump` writes reads back equal here and in any YAML 1.1 reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

TAG = "tag:yaml.org,2002:"
MOST_NODES = 100_000
"""Values in a document, aliases written out: a few lines of aliases of aliases stand for more than any memory holds."""
FINITE = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
FLOAT = re.compile(rf"(?:{FINITE}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
SCALARS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
)


class PlainYamlError(ValueError):
    """A text is not YAML, which knows no equal keys either; the message is one line and says where."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of this module and without recursive mappings."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class attribute, emptied for this class alone


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which only :class:`_Loader` takes for a number; lists stay on one line."""


def _construct_whole_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
    return loader.construct_mapping(node, deep=True)


for _name, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(TAG + _name, _pattern, _first)
_Loader.add_constructor(TAG + "map", _construct_whole_mapping)
_Dumper.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(TAG + "seq", items, flow_style=True))


def load(text: str | bytes) -> object:
    """Reads one YAML document into dicts, lists, str, int, float, bool and None.

    Raises:
        PlainYamlError: the text is not YAML, a key stands twice in one mapping, or it stands for too much.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if num_nodes(root, {}) > MOST_NODES:
            raise PlainYamlError(f"it has more than {MOST_NODES:,} values, aliases counted each time")
        refuse_duplicates(root)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise PlainYamlError(one_line(error)) from error
    except PlainYamlError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise PlainYamlError(str(error)) from error
    except RecursionError as error:
        raise PlainYamlError("it is nested too deeply") from error


def dump(value: object) -> str:
    """Writes dicts, lists and scalars as YAML in ASCII, since PyYAML leaves the line breaks of Unicode unescaped otherwise."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1_000_000)


def refuse_duplicates(root: yaml.Node) -> None:
    """Raises PlainYamlError at the first key that its mapping holds twice."""
    for path, mapping in mappings(root, "", set()):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise PlainYamlError(f"{path}{name} stands on line {lines[name]} and again on line {line}")
            lines[name] = line


def num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes under ``node``, those of an alias counted each time; ``known`` holds what has been counted, by identity."""
    if id(node) not in known:
        known[id(node)] = 1  # where aliases make a circle, for each time around
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.CollectionNode):
            known[id(node)] += sum(num_nodes(part, known) for part in parts)
    return known[id(node)]


def mappings(node: yaml.Node, path: str, seen: set[int]) -> Iterator[tuple[str, yaml.MappingNode]]:
    """Yields every mapping under ``node`` with its dotted prefix, each once, since aliases can make a circle."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield path, node
        for key, value in node.value:
            yield from mappings(value, f"{path}{key.value}.", seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from mappings(value, path, seen)


def one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = f"{error.context}: " if error.context else ""
        return f"line {error.problem_mark.line + 1}, {context}{error.problem}"
    return " ".join(str(error).split())
