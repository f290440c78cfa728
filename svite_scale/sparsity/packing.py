"""Packing: dense layers of a model become packed ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike, fspath

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from svite_scale.errors import OptionError, SparsifyError, TopologyError
from svite_scale.sparsity.allocation.first_masks import FirstMasks, NonzeroWeights
from svite_scale.sparsity.allocation.layer_plan import LayerPlan, plan_layers
from svite_scale.sparsity.allocation.mask_file import MaskFile
from svite_scale.sparsity.block_grid import SINGLE, BlockGrid
from svite_scale.sparsity.hashing import hashed_uniform
from svite_scale.sparsity.layers.blocks import BlockConv2d, BlockLinear, is_matrix
from svite_scale.sparsity.layers.packed import PackedConv2d, PackedLayer, PackedLinear
from svite_scale.sparsity.layers.plain_layer import PLAIN, lost_in_packing, own_attributes, plain_type, refuse_wrapped
from svite_scale.sparsity.module_names import named_modules
from svite_scale.sparsity.options import FROM_WEIGHTS, Allocation
from svite_scale.sparsity.update import grow

PACKED_TYPE: dict[type[nn.Module], type[PackedLayer]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
BLOCK_TYPE: dict[type[nn.Module], type[PackedLayer]] = {nn.Linear: BlockLinear, nn.Conv2d: BlockConv2d}

logger = logging.getLogger("svite_scale")


def sparsify(
    model: nn.Module,
    density: float | None = None,
    *,
    distribution: str = Allocation.distribution,
    power_scale: float = Allocation.power_scale,
    densities: Mapping[str, float] | None = None,
    masks: str | PathLike[str] | None = None,
    block: tuple[int, int] = Allocation.block,
    keep_dense: Sequence[str] = (),
    init: str = Allocation.init,
    seed: int = 0,
    by_magnitude: bool = False,
) -> list[LayerPlan]:
    """Replaces the prunable Linear and Conv2d modules of a model by packed ones, in place: all of them, or none on an error.

    Call it before any engine wraps the model, on every rank with the same arguments: the masks then agree without
    communication, since each is a function of (seed, layer name), of the weights, or comes from a file. Active weights keep
    their values, times a factor that ``init`` chooses. Norms, biases, position embeddings and class tokens stay dense.

    Where the active weights are is said by exactly one of ``density``, ``densities`` and ``masks``. Counts are exact, and a
    layer whose part of the density is below one weight keeps one, which is logged. Patterns are those of
    :mod:`~svite_scale.sparsity.allocation.layer_patterns`.

    Args:
        model: for example a timm VisionTransformer; on the meta device only shapes are planned and packed.
        density: fraction of all prunable weights that stays active, in (0, 1].
        distribution: of ``density`` over the layers, ``erk``, ``er`` or ``uniform``.
        power_scale: exponent of ERK's ratio, above 0.
        densities: density in (0, 1] by pattern of layer names; the first pattern that matches a layer decides it.
        masks: a safetensors file that :class:`~svite_scale.sparsity.allocation.mask_file.MaskFile` describes; or
            ``from_weights``, for a model that is pruned already: weights that are 0 are inactive, in exact numbers. A layer
            without zeros stays dense.
        block: V and U: weights are active or inactive in blocks of V rows by U columns. With V of 16 or more, products take the
            time of the active blocks only. Linear layers, and convolutions of patches that don't overlap, are in blocks if V
            and U divide their rows and columns; all others keep single weights, which is logged.
        keep_dense: patterns of layers that aren't made sparse, and don't count in ``density``.
        init: ``fan_in`` multiplies active weights by the root of a layer's inputs over its active inputs, so that its outputs
            keep their spread; in blocks, each row of blocks by its own. ``dense`` keeps the values, for a model that is trained
            already. So do ``by_magnitude`` and ``masks="from_weights"``, whatever ``init`` is.
        seed: of the masks that are drawn.
        by_magnitude: the weights of largest magnitude are active at first, in each layer as many as its density says: for a
            model that is trained already. False draws them.

    Returns:
        The plan, layer by layer, in order of registration.

    Raises:
        TopologyError: nothing is prunable, a weight is shared, sharded or frozen, or a module is packed already, or can't be,
            or has hooks or the like that packing would lose.
        SparsifyError: patterns, masks or density don't fit the model.
        OptionError: an argument is out of range, or has no effect; it is a ValueError, and so is SparsifyError.
        ValueError: not exactly one of the three is given.
    """
    found = {"density": density is not None, "densities": bool(densities), "masks": masks is not None}
    given = [name for name, is_given in found.items() if is_given]
    if len(given) != 1:
        raise ValueError(f"give exactly one of density, densities and masks, not {' and '.join(given) or 'none'}")
    if by_magnitude and masks is not None:
        raise OptionError("by_magnitude", True, "isn't used where masks is given", "leave it out")
    allocation = Allocation(
        density=1.0 if density is None else density,
        distribution=distribution,  # type: ignore[arg-type]
        power_scale=power_scale,
        densities=densities or {},  # type: ignore[arg-type]
        masks=None if masks is None else fspath(masks),
        block=block,
        keep_dense=tuple(keep_dense),
        init=init,  # type: ignore[arg-type]
    )
    return pack_weights(model, allocation, seed, by_magnitude=by_magnitude)


def pack_weights(
    model: nn.Module,
    allocation: Allocation,
    seed: int,
    packed_otherwise: Collection[str] = (),
    *,
    masks: FirstMasks | None = None,
    by_magnitude: bool = False,
) -> list[LayerPlan]:
    """Does what :func:`sparsify` says for an allocation.

    Args:
        model: see :func:`sparsify`, which says what is returned and raised too.
        allocation: says where the active weights are.
        seed: of the masks that are drawn.
        packed_otherwise: names of layers that are packed already, by heads or neurons; ``keep_dense`` may match them.
        masks: the first masks, in place of those that ``allocation.masks`` names; unused where that is None.
        by_magnitude: see :func:`sparsify`.
    """
    layers = prunable_layers(model)
    masks = masks if allocation.masks and masks else _first_masks(layers, allocation)
    plan = plan_layers(_grids(layers, allocation.block), allocation, packed_otherwise, masks)
    refuse_shared(model, {entry.name for entry in plan if not entry.kept_dense})

    def first_mask(entry: LayerPlan) -> Tensor:
        weight = layers[entry.name].weight
        if masks is not None:
            return masks.read(entry.name, entry.grid).to(weight.device)
        num_active = entry.num_active // entry.grid.block_numel
        if by_magnitude:
            return largest(entry.grid.norms(weight.detach()), num_active)
        return random_mask(entry.grid.num_blocks, num_active, seed, entry.name, weight.device)

    are_trained = by_magnitude or allocation.masks == FROM_WEIGHTS
    by_fan_in = allocation.init == "fan_in" and not are_trained
    packed = {entry.name: _packed(layers[entry.name], entry, first_mask, by_fan_in) for entry in plan if entry.is_packed}
    # Nothing can fail any more, and nothing was changed yet.
    for name, module in packed.items():
        replace_module(model, name, module)
    _warn_of_exceptions(plan, allocation.block)
    return plan


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Returns the modules whose weights may be pruned: exactly Linear and Conv2d, since a subclass may use its weight in
    another way. Named as in the model without what engines' wrappers add to names.
    """
    packed = [name for name, module in named_modules(model) if isinstance(module, PackedLayer)]
    if packed:
        raise TopologyError(f"the model is packed already, {packed[0] or 'itself'} among others; sparsify a dense model")
    refuse_wrapped(model)
    layers = {name: module for name, module in named_modules(model) if isinstance(module, (nn.Linear, nn.Conv2d))}
    lazy = [name for name, layer in layers.items() if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()]
    if lazy:
        raise TopologyError(f"{lazy[0]} is lazy and has no shape yet; run the model on a batch before making it sparse")
    layers = {name: layer for name, layer in layers.items() if plain_type(layer) in PACKED_TYPE}
    if "" in layers:
        raise TopologyError(f"the model is itself a {type(model).__name__}; put it in an nn.Sequential to make it sparse")
    if not layers:
        raise TopologyError(f"{type(model).__name__} has no Linear or Conv2d module to make sparse")
    return layers


def refuse_shared(model: nn.Module, names: set[str]) -> None:
    """Refuses a model in which one of the named modules shares a parameter with another module, or is named by two places."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            other, owner = owners.setdefault(id(parameter), (name, module))
            named = {other, name} & names
            if other != name and (len(named) == 2 or (named and owner is not module)):
                raise TopologyError(f"{other} and {name} share a parameter; untie them before making them sparse")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` wherever the submodule ``name`` is."""
    replaced = dict(named_modules(model))[name]
    # By identity, for it may stand in several places, and wrappers may call it otherwise.
    places = [path for path, child in model.named_modules(remove_duplicate=False) if child is replaced]
    for path in places:
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, module)


def random_mask(numel: int, num_active: int, seed: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Returns a uniformly random mask, the same on every device: the positions of the largest hashed numbers.

    Args:
        numel: positions, N.
        num_active: positions to set.
        seed: of the run.
        name: of the layer.
        device: where to draw it.

    Returns:
        bool ``[N]`` with exactly ``num_active`` set.
    """
    return largest(hashed_uniform(seed, 0, name, numel, device), num_active)


def largest(scores: Tensor, count: int) -> Tensor:
    """Returns where the ``count`` largest of some scores are, bool ``[N]`` for ``[N]``; of equal ones the first.

    Raises:
        TopologyError: a score is NaN.
    """
    return grow(torch.zeros_like(scores, dtype=torch.bool), scores, count).active


def _first_masks(layers: Mapping[str, nn.Linear | nn.Conv2d], allocation: Allocation) -> FirstMasks | None:
    """Returns the masks that ``allocation.masks`` names; None if a density says where the weights are."""
    if allocation.masks == FROM_WEIGHTS:
        return NonzeroWeights(lambda name, _: layers[name].weight.detach().flatten() != 0)
    return None if allocation.masks is None else MaskFile(allocation.masks)


def _grids(layers: Mapping[str, nn.Linear | nn.Conv2d], block: tuple[int, int]) -> dict[str, BlockGrid]:
    """Returns the grid of each layer's weight: of single weights where the block doesn't fit."""
    grids = {}
    for name, layer in layers.items():
        grid = BlockGrid(layer.weight.shape, block)
        grids[name] = grid if is_matrix(layer) and grid.fits() else BlockGrid(layer.weight.shape)
    if block != SINGLE and all(grid.block == SINGLE for grid in grids.values()):
        name, layer = next(iter(layers.items()))
        rows, columns = BlockGrid(layer.weight.shape).matrix
        problem = f"divides no layer's weight; {name}, for one, has {rows} rows and {columns} columns"
        raise SparsifyError("block", list(block), problem, "choose rows and columns that divide those of most layers")
    return grids


def _packed(
    dense: nn.Linear | nn.Conv2d, plan: LayerPlan, first_mask: Callable[[LayerPlan], Tensor], by_fan_in: bool
) -> PackedLayer:
    """Returns the packed layer for a dense one, which isn't changed."""
    weight = dense.weight
    lost = lost_in_packing(dense)
    if lost is not None:
        raise TopologyError(f"{plan.name} {lost.problem}, which packing would lose; {lost.remedy}, or list it in keep_dense")
    if weight.is_complex():
        raise TopologyError(f"{plan.name}: its weight is {weight.dtype}, and sparse weights are real; list it in keep_dense")
    if not weight.requires_grad:
        raise TopologyError(f"{plan.name}: its weight is frozen, and sparse weights are trained; list it in keep_dense")
    packed_type = (PACKED_TYPE if plan.block == SINGLE else BLOCK_TYPE)[type(dense)]
    layer = packed_type(dense, plan.num_active // plan.grid.block_numel, plan.name, plan.block)
    _copy_attributes(dense, layer, plan.name)
    if not weight.is_meta:
        layer.set_weight(weight, first_mask(plan))
        if by_fan_in:
            layer.scale_by_fan_in()
    return layer


def _copy_attributes(dense: nn.Linear | nn.Conv2d, layer: PackedLayer, name: str) -> None:
    """Sets on the packed layer, and on its values, what somebody set on the dense one and on its weight."""
    for attribute, value in own_attributes(dense, PLAIN[type(dense)]).items():
        if hasattr(layer, attribute):
            raise TopologyError(f"{name} has an attribute {attribute!r}, which a packed layer has for itself; rename it")
        setattr(layer, attribute, value)
    for attribute, value in vars(dense.weight).items():
        setattr(layer.values, attribute, value)


def _warn_of_exceptions(plan: Iterable[LayerPlan], block: tuple[int, int]) -> None:
    raised = [entry.name for entry in plan if entry.raised]
    if raised:
        logger.warning(
            "layers whose part of the density is below one weight or block keep one each (%d): %s",
            len(raised),
            ", ".join(raised),
        )
    single = [entry.name for entry in plan if entry.is_packed and entry.block != block]
    if single:
        logger.warning(
            "layers that blocks of %d x %d don't divide keep single weights, which take the time of dense ones (%d): %s",
            *block,
            len(single),
            ", ".join(single),
        )
