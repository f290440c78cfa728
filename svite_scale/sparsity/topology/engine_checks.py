"""What a topology engine can't take, or can't move."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.layers.base import SparseLayer


def refuse_taken(layers: Mapping[str, SparseLayer]) -> None:
    """Refuses layers, by name, that another engine moves already, or of which two share what moves.

    Raises:
        TopologyError: names them.
    """
    owners: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        if layer.engine is not None and layer.engine() is not None:
            raise TopologyError(f"{name} has a topology engine already, and can't have two; call detach() on that one first")
        for key, moving in layer.moving().items():
            other = owners.setdefault(moving.parameter, name)
            if other != name:
                raise TopologyError(
                    f"{other} and {name} share {key}, though each has active weights of its own; untie them, or make them one "
                    "module"
                )


def check_stepped(name: str, layer: SparseLayer, access: ParameterAccess, remedy: str) -> None:
    """Refuses a layer that isn't frozen, but which the optimizer doesn't step. Local.

    Raises:
        TopologyError: names the parameter, and the remedy.
    """
    if layer.is_frozen:
        return
    for key, moving in layer.moving().items():
        if not access.steps(moving.parameter):
            raise TopologyError(f"the optimizer doesn't step {name}.{key}; {remedy}")
