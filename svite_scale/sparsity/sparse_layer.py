"""What the topology engine asks of a module of which only a part is active: weights, whole neurons, or whole heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svite_scale.sparsity.mask import plain_bits
from svite_scale.sparsity.remap import Remap

GradientSink = Callable[[Tensor], None]
"""Takes what a layer's growth scores are made of, ``[growth_numel]`` in any shape, inside its backward. May be a collective."""

Read = Callable[[nn.Parameter], Tensor]
"""Full fp32 value of a parameter, whatever shards it; a collective."""

Gather = Callable[[], Tensor]
"""What the sink took, averaged over ranks and the growth window, its magnitude, fp32 ``[growth_numel]``; a collective."""


@dataclass(frozen=True)
class MovingTensor:
    """A parameter that holds a part of every active unit.

    Attributes:
        parameter: ``[repeats * k, ...]``, the k active units in ascending order, ``repeats`` times over.
        repeats: 3 for queries, keys and values that share a weight, else 1.
        row_numel: elements of each of these rows.
    """

    parameter: nn.Parameter
    repeats: int = 1
    row_numel: int = 1


class SparseLayer(nn.Module):
    """A module that has N units, of which k are active; which ones is up to the topology engine.

    Attributes:
        unit: what is active or not.
        name: in the model it was made in, whatever engine wraps that model later.
        shape: of all units, N elements.
        num_active: active units, k.
        mask: frozen uint8 parameter, ``[ceil(N / 8)]``, one bit per unit.
        gradient_sink: see :data:`GradientSink`; None outside growth windows.
        update_step: the optimizer step after which the update comes that the sink hears for.
    """

    unit: ClassVar[str]
    name: str
    shape: torch.Size
    num_active: int
    mask: nn.Parameter
    gradient_sink: GradientSink | None = None
    update_step: int = 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As any module's, with the mask as a plain tensor, which any library can store."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}mask"] = plain_bits(self.mask)

    def to_dense(self) -> nn.Module:
        """A new dense module of the kind whose place this one took, with zeros for what is inactive."""
        raise NotImplementedError

    @property
    def growth_numel(self) -> int:
        """Elements that the sink takes."""
        raise NotImplementedError

    def moving(self) -> dict[str, MovingTensor]:
        """By name within the layer, the parameters that follow the topology."""
        raise NotImplementedError

    def importance(self, read: Read, gather: Gather, mask: Tensor) -> Tensor:
        """What an active unit is dropped for the lack of, in magnitude, fp32 ``[N]``; ``mask`` is the full mask."""
        raise NotImplementedError

    def growth_scores(self, gather: Gather) -> Tensor:
        """What an inactive unit is grown for, fp32 ``[N]``."""
        raise NotImplementedError

    def births(self, remap: Remap) -> Mapping[str, Tensor]:
        """By name within the layer, what the units grown by the update begin with, ``[repeats, grown units, row_numel]``;
        what isn't named begins with 0.
        """
        return {}


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model, wrapped by an engine or not, by their names in it, in order of registration."""
    return {module.name: module for module in model.modules() if isinstance(module, SparseLayer)}
