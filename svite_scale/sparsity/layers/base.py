"""What the topology engine asks of a module of which only a part is active: weights, whole neurons, or whole heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.mask import plain_bits
from svite_scale.sparsity.module_names import named_modules
from svite_scale.sparsity.transition import Remap

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
        name: in the model it was made in; once a topology engine has it, in the model that the engine was given.
        shape: of all units, N elements.
        num_active: active units, k.
        mask: frozen uint8 parameter, ``[ceil(N / 8)]``, one bit per unit.
        gradient_sink: see :data:`GradientSink`; None outside growth windows.
        update_step: the optimizer step after which the update comes that the sink hears for.
        engine: the topology engine that moves its units, as long as there is one; None where none does.
    """

    unit: ClassVar[str]
    name: str
    shape: torch.Size
    num_active: int
    mask: nn.Parameter
    gradient_sink: GradientSink | None = None
    update_step: int = 0
    engine: ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: a copy isn't heard, and no engine moves it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("gradient_sink", "engine")}

    def name_at(self, path: str) -> str:
        """Its name where it is the submodule ``path`` of a model, which is empty where it is the model itself."""
        return path or self.name

    @property
    def is_frozen(self) -> bool:
        """Whether some of what follows the topology isn't trained, so that the topology stays too."""
        return not all(moving.parameter.requires_grad for moving in self.moving().values())

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
    """The sparse layers of a model, by where they are in it, whatever engines wrap it; in order of registration.

    Raises:
        TopologyError: two have one name.
    """
    layers: dict[str, SparseLayer] = {}
    for path, module in named_modules(model):
        if isinstance(module, SparseLayer):
            name = module.name_at(path)
            if name in layers:
                raise TopologyError(f"two sparse layers of {type(model).__name__} are called {name}; rename a submodule")
            layers[name] = module
    return layers
