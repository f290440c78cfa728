"""One layer's part of a topology update: which weights go and come, and writing it down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.access import FollowsTopology, ParameterAccess
from svite_scale.sparsity.layers.base import MovingTensor, SparseLayer
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.growth import GrowthScores
from svite_scale.sparsity.topology.methods import Candidates, Method, Score
from svite_scale.sparsity.transition import Remap, grown_moment, state_kind
from svite_scale.sparsity.update import drop, grow


@dataclass(frozen=True)
class LayerDecision:
    """What is to become of a layer's topology.

    Attributes:
        count: weights dropped, and grown.
        old_mask: uint8 ``[ceil(N / 8)]``.
        new_mask: the same, afterwards.
        drop_threshold: largest score dropped; None where ``count`` is 0.
        grow_threshold: smallest score grown; None where ``count`` is 0.
    """

    count: int
    old_mask: Tensor
    new_mask: Tensor
    drop_threshold: float | None
    grow_threshold: float | None


def num_moved(num_active: int, rate: float) -> int:
    """Weights that an update drops and grows in a layer: ceil(rate * active)."""
    return min(math.ceil(rate * num_active), num_active)


def decide(
    layer: SparseLayer,
    method: Method,
    rate: float,
    step: int,
    options: TopologyOptions,
    access: ParameterAccess,
    growth: GrowthScores,
) -> LayerDecision:
    """What a method does to a layer, the same on every rank. A collective; changes nothing.

    Raises:
        TopologyError: a score is NaN or has the wrong shape; the message names the layer.
    """
    old_mask = access.read(layer.mask).clone()
    active = bits.unpack(old_mask, layer.shape.numel())
    count = num_moved(layer.num_active, rate)

    def gather() -> Tensor:
        return growth.gather(layer)

    def scored(score: Score, eligible: Tensor) -> Tensor:
        candidates = Candidates(
            name=layer.name,
            step=step,
            seed=options.seed,
            count=count,
            eligible=eligible,
            random_share=options.random_share,
            read_values=lambda: layer.importance(access.read, gather, old_mask),
            read_gradient=lambda: layer.growth_scores(gather),
        )
        return score(candidates)

    try:
        active, drop_threshold = drop(active, scored(method.drop, active), count)
        active, grow_threshold = grow(active, scored(method.grow, ~active), count)
    except TopologyError as error:
        raise TopologyError(f"topology update of {layer.name} after step {step}: {error}") from error
    return LayerDecision(count, old_mask, bits.pack(active), drop_threshold, grow_threshold)


def check_state(layers: Iterable[SparseLayer], access: ParameterAccess, options: TopologyOptions, *, stepped: bool) -> None:
    """Refuses optimizer state that couldn't follow the weights, before any of them moves.

    Args:
        layers: those whose weights move.
        access: to their parameters.
        options: know what the state means.
        stepped: see :meth:`~svite_scale.sparsity.access.ParameterAccess.check_state`.

    Raises:
        TopologyError: names the parameter and the state.
    """
    for layer in layers:
        for key, moving in layer.moving().items():
            if not moving.parameter.requires_grad:
                continue
            try:
                access.check_state(moving.parameter, stepped=stepped)
                for name in access.moment_names(moving.parameter):
                    state_kind(name, options.optimizer_state)
            except TopologyError as error:
                raise TopologyError(f"{layer.name}.{key}: {error}") from error


def write_topology(
    layer: SparseLayer,
    remap: Remap,
    access: ParameterAccess,
    options: TopologyOptions,
    followers: Sequence[FollowsTopology] = (),
) -> None:
    """Carries a layer's parameters, their optimizer state and what follows them to the new mask, one tensor at a time.

    A collective.
    """
    births = layer.births(remap)
    for key, moving in layer.moving().items():
        parameter, born = moving.parameter, births.get(key, 0.0)
        for carried in (access, *followers):
            carried.write(parameter, _carry(remap, moving, carried.read(parameter), born))
        for name in access.moment_names(parameter):
            moment = access.read_moment(parameter, name)
            grown = grown_moment(name, moment, options.grown_moments, born, options.optimizer_state)
            access.write_moment(parameter, name, _carry(remap, moving, moment, grown))
    access.write(layer.mask, remap.new)


def _carry(remap: Remap, moving: MovingTensor, packed: Tensor, grown: float | Tensor) -> Tensor:
    if moving.repeats == moving.row_numel == 1:
        return remap.carry(packed, grown)
    return remap.carry_rows(packed, moving.repeats, grown)
