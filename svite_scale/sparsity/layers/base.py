"""The interface between the topology engine and modules of which only a part is active: weights, blocks, neurons, or heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from typing_extensions import Self

from svite_scale.errors import TopologyError
from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.hooks import GradientHook, new_handle
from svite_scale.sparsity.mask import plain_bits
from svite_scale.sparsity.module_names import named_modules
from svite_scale.sparsity.transition import TopologyTransition

Dense = TypeVar("Dense", nn.Linear, nn.Conv2d)


class RecordedGradients(Protocol):
    """The gradients recorded in a growth window, as :class:`~svite_scale.sparsity.topology.growth.GrowthScores` has them."""

    def gather(self, layer: SparseLayer) -> Tensor:
        """Returns what a layer's hook took, averaged over ranks and window, its magnitude, fp32 ``[growth_numel]``; a new
        tensor. A collective.
        """


@dataclass(frozen=True)
class LayerContext:
    """One layer at an update, and the way to its full tensors, whatever shards them. Its methods are collectives.

    Attributes:
        layer: the layer.
        mask: its full mask before the update, uint8 ``[ceil(N / 8)]``.
        access: reads its parameters.
        gradients: holds its recorded gradients.
    """

    layer: SparseLayer
    mask: Tensor
    access: ParameterAccess
    gradients: RecordedGradients

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Returns the full fp32 value of a parameter of the layer."""
        return self.access.read(parameter)

    def gather(self) -> Tensor:
        """Returns the recorded gradients; see :meth:`RecordedGradients.gather`."""
        return self.gradients.gather(self.layer)

    def importance(self) -> Tensor:
        """Returns the layer's :meth:`SparseLayer.importance`."""
        return self.layer.importance(self)

    def growth_scores(self) -> Tensor:
        """Returns the layer's :meth:`SparseLayer.growth_scores`."""
        return self.layer.growth_scores(self)


@dataclass(frozen=True)
class UnitParameter:
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
    """A module that has N units, of which k are active. The topology engine decides which.

    Attributes:
        unit: the kind of its units: ``weights``, ``blocks``, ``neurons`` or ``heads``.
        name: in the model it was made in; once a topology engine has it, in the model that the engine was given.
        shape: of all units, N elements.
        num_active: active units, k.
        mask: frozen uint8 parameter, ``[ceil(N / 8)]``, one bit per unit.
        gradient_hook: see :data:`~svite_scale.sparsity.hooks.GradientHook`; None outside growth windows.
        handle: by which operators find the hook; see :mod:`svite_scale.sparsity.hooks`.
        update_step: step of the topology update that gradients are being recorded for.
        engine: the topology engine that moves its units, as long as there is one; None where there is none.
    """

    unit: ClassVar[str]
    name: str
    shape: torch.Size
    num_active: int
    mask: nn.Parameter
    gradient_hook: GradientHook | None = None
    handle: Tensor
    update_step: int = 0
    engine: ref[Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes a layer, a copy or an unpickled one too, with a handle of its own."""
        layer = super().__new__(cls)
        layer.handle = new_handle(layer)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state that copies and pickles are made of: a copy has no engine, and nothing of it is recorded."""
        return {name: value for name, value in self.__dict__.items() if name not in ("gradient_hook", "handle", "engine")}

    def name_at(self, path: str) -> str:
        """Returns its name where it is the submodule ``path`` of a model, which is empty where it is the model itself."""
        return path or self.name

    @property
    def is_frozen(self) -> bool:
        """True if some of its unit parameters aren't trained; its topology then doesn't change."""
        return not all(part.parameter.requires_grad for part in self.unit_parameters().values())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves as any module does, with the mask as a plain tensor, which any library can store."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}mask"] = plain_bits(self.mask)

    def num_multiplied(self, device: torch.device) -> int:
        """Returns the number of units that its products on a device multiply: the active ones, or all N where inactive ones are
        multiplied as zeros.
        """
        return self.num_active

    def to_dense(self) -> nn.Module:
        """Returns a new dense module of the kind that this one replaced, with zeros for what is inactive."""
        raise NotImplementedError

    @property
    def growth_numel(self) -> int:
        """Elements that the gradient hook takes."""
        raise NotImplementedError

    def record_gradient(self, gradient: Tensor, *inputs: Tensor) -> None:
        """Passes what growth scores are made of to the gradient hook, inside backward. Called only while there is a hook.

        Args:
            gradient: of the loss, with respect to the dense weight; or, for neurons and heads, to the layer's output,
                ``[B, tokens, out]``.
            inputs: of neurons and heads the layer's input, ``[B, tokens, in]``, and the mask of an attention that has one.
        """
        raise NotImplementedError

    def unit_parameters(self) -> dict[str, UnitParameter]:
        """Returns, by name within the layer, the parameters that follow the topology."""
        raise NotImplementedError

    def importance(self, context: LayerContext) -> Tensor:
        """Returns the importance of each active unit, in magnitude, fp32 ``[N]``; the least important are dropped. A
        collective.
        """
        raise NotImplementedError

    def growth_scores(self, context: LayerContext) -> Tensor:
        """Returns the score of each inactive unit, fp32 ``[N]``; those of the largest are grown. A collective."""
        raise NotImplementedError

    def initial_rows(self, transition: TopologyTransition) -> Mapping[str, Tensor]:
        """Returns, by name within the layer, the first values of the units that an update grows, ``[repeats, grown units,
        row_numel]``. A parameter that isn't named starts at 0.
        """
        return {}


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Returns the sparse layers of a model, by their names in it, whatever engine wraps it; in order of registration.

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


@torch.no_grad()
def filled(empty: Dense, weight: Tensor, bias: nn.Parameter | Tensor | None, like: SparseLayer, trained: nn.Parameter) -> Dense:
    """Returns a dense layer with these numbers.

    Args:
        empty: the layer, on the meta device.
        weight: its weight, a tensor that nothing else holds.
        bias: its bias, which is copied.
        like: the sparse layer whose training flag it gets.
        trained: the parameter whose ``requires_grad`` the weight gets.
    """
    empty.weight = nn.Parameter(weight.contiguous(), requires_grad=trained.requires_grad)
    if bias is not None:
        empty.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return empty.train(like.training)


def with_signature(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Stores a function's signature: ``Function.apply`` asks for it at each call, and finding it takes long."""
    function.__signature__ = signature(function)  # type: ignore[attr-defined]  # as PEP 362 has it
    return function
