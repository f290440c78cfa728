"""Checks before a topology engine is built, and before it moves weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.transition import state_kind


def refuse_attached(layers: Mapping[str, SparseLayer]) -> None:
    """Refuses layers, by name, that have a topology engine already, or of which two share a parameter that moves.

    Raises:
        TopologyError: names the layers.
    """
    owners: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        if layer.engine is not None and layer.engine() is not None:
            raise TopologyError(f"{name} has a topology engine already, and can't have two; call detach() on that one first")
        for key, part in layer.unit_parameters().items():
            other = owners.setdefault(part.parameter, name)
            if other != name:
                raise TopologyError(
                    f"{other} and {name} share {key}, though each has active weights of its own; untie them, or make them one "
                    "module"
                )


def check_stepped(name: str, layer: SparseLayer, access: ParameterAccess, remedy: str) -> None:
    """Refuses a layer that isn't frozen, but that the optimizer doesn't step. Local.

    Raises:
        TopologyError: names the parameter, and the remedy.
    """
    if layer.is_frozen:
        return
    for key, part in layer.unit_parameters().items():
        if not access.steps(part.parameter):
            raise TopologyError(f"the optimizer doesn't step {name}.{key}; {remedy}")


def check_state(layers: Iterable[SparseLayer], access: ParameterAccess, options: TopologyOptions, *, stepped: bool) -> None:
    """Refuses optimizer state that can't follow moving weights, before any weight moves.

    Args:
        layers: those whose weights move.
        access: to their parameters.
        options: say what state of an unknown name means.
        stepped: see :meth:`~svite_scale.sparsity.access.ParameterAccess.check_state`.

    Raises:
        TopologyError: names the parameter and the state.
    """
    for layer in layers:
        for key, part in layer.unit_parameters().items():
            if not part.parameter.requires_grad:
                continue
            try:
                access.check_state(part.parameter, stepped=stepped)
                for name in access.moment_names(part.parameter):
                    state_kind(name, options.optimizer_state)
            except TopologyError as error:
                raise TopologyError(f"{layer.name}.{key}: {error}") from error
