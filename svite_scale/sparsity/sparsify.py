"""Turning a dense model's prunable layers into packed ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.distributions import DISTRIBUTIONS, counts
from svite_scale.sparsity.layers import PackedConv2d, PackedLayer, PackedLinear

PACKED_TYPE: dict[type[nn.Module], type[PackedLinear] | type[PackedConv2d]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


@dataclass(frozen=True)
class LayerPlan:
    """One prunable layer: where it is, its weight's shape, and how many of its weights are active."""

    name: str
    shape: torch.Size
    num_active: int

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def density(self) -> float:
        return self.num_active / self.numel

    @property
    def is_packed(self) -> bool:
        """A layer whose weights are all active stays an ordinary dense module: there's nothing to pack or to move."""
        return self.num_active < self.numel


def sparsify(model: nn.Module, density: float, *, distribution: str = "erk", seed: int = 0) -> list[LayerPlan]:
    """Replaces the prunable Linear and Conv2d modules of a model by packed ones, in place.

    Call it before any engine wraps the model, on every rank with the same arguments: the masks then agree without
    communication, since each is drawn uniformly at random from (seed, layer name). Active weights keep their initial values.
    Norms, biases, position embeddings and class tokens stay dense.

    Args:
        model: for example a timm VisionTransformer; on the meta device only shapes are planned and packed.
        density: share of all prunable weights that stays active, in (0, 1]; counts are exact.
        distribution: ``erk`` or ``uniform``.
        seed: of the masks.

    Returns:
        The plan that was carried out, layer by layer, in order of registration.

    Raises:
        TopologyError: nothing is prunable, a weight is shared, or a module is packed already.
        ValueError: density or distribution is out of range.
    """
    layers = prunable_layers(model)
    plan = plan_layers(layers, density, distribution)
    for entry in plan:
        if entry.is_packed:
            replace_module(model, entry.name, _packed(layers[entry.name], entry, seed))
    return plan


def plan_layers(layers: dict[str, nn.Linear | nn.Conv2d], density: float, distribution: str) -> list[LayerPlan]:
    """The exact count of active weights of each layer under a global density."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r} is unknown; use one of {', '.join(DISTRIBUTIONS)}")
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    num_active = counts(shapes, DISTRIBUTIONS[distribution](shapes, density))
    return [LayerPlan(name, shape, num_active[name]) for name, shape in shapes.items()]


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules whose weights may be pruned: exactly Linear and Conv2d, since a subclass may use its weight in ways of its
    own.
    """
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise TopologyError("the model is packed already; sparsify a dense model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    layers = {name: module for name, module in layers.items() if type(module) in PACKED_TYPE}
    if not layers:
        raise TopologyError(f"{type(model).__name__} has no Linear or Conv2d module to make sparse")
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in layers or other in layers):
                raise TopologyError(f"{other} and {name} share a parameter; untie them before making them sparse")
    return layers


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where the submodule ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def random_mask(numel: int, num_active: int, seed: int, name: str) -> Tensor:
    """A uniformly random mask, bool ``[numel]`` with exactly ``num_active`` set; a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[:num_active]] = True
    return mask


def _packed(dense: nn.Linear | nn.Conv2d, plan: LayerPlan, seed: int) -> PackedLayer:
    layer = PACKED_TYPE[type(dense)](dense, plan.num_active, plan.name)  # type: ignore[arg-type]
    if not dense.weight.is_meta:
        layer.set_weight(dense.weight, random_mask(plan.numel, plan.num_active, seed, plan.name).to(dense.weight.device))
    return layer
