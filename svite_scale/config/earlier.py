"""What the configs of earlier versions mean, which have fewer fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from svite_scale.config.load import flatten_config, leaf_hints, leaves, make_config, read_mapping, to_dict
from svite_scale.config.schema import Config

Values = Mapping[str, object]
"""Values of a config's fields, by dotted name."""


class Earlier(NamedTuple):
    """What a version did that hadn't a field yet, if the field's default does something else."""

    value: object
    """The value of the field that means it."""
    applies: Callable[[Values], bool]
    """Returns whether a config of these values may have the field. All other fields are among them."""


def _packs_units(values: Values) -> bool:
    return values["sparsity.structured.heads"] != 1.0 or values["sparsity.structured.neurons"] != 1.0


def _keeps_tokens(values: Values) -> bool:
    return values["sparsity.tokens.keep"] is not None


def _always(values: Values) -> bool:
    return True


EARLIER: dict[str, Earlier] = {
    "sparsity.init": Earlier("dense", _always),
    "sparsity.structured.drop_fraction": Earlier(None, _packs_units),
    "sparsity.tokens.signal": Earlier("paper", _keeps_tokens),
}
"""By dotted name of a field. A field whose default does what earlier versions did needs no entry."""


def missing_fields(saved: Values) -> dict[str, object]:
    """Returns the values of :data:`EARLIER` for the fields that a saved config doesn't have."""
    values = flatten_config(to_dict(Config(run_dir=""))) | dict(saved)
    return {name: field.value for name, field in EARLIER.items() if name not in saved and field.applies(values)}


def complete(saved: Values) -> dict[str, object]:
    """Returns the values of all fields of a saved config. A field that the saving version hadn't yet has the value that means
    what that version did.
    """
    return flatten_config(to_dict(Config(run_dir=""))) | dict(saved) | missing_fields(saved)


def read_saved_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the ``config.yaml`` of a run, which an earlier version may have written.

    Args:
        path: of the file.
        overrides: as for :func:`~svite_scale.config.load.read_config`.

    Raises:
        ConfigError: the file can't be read, or a key or a value isn't what a Config holds.
    """
    saved = dict(leaves(read_mapping(path), leaf_hints(Config)))
    return make_config(saved | missing_fields(saved), overrides, str(path))
