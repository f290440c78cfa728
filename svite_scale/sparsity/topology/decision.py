"""One layer's part of a topology update: the decision which units are dropped and grown, and carrying it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.access import ParameterAccess, TrackedTensors
from svite_scale.sparsity.hashing import hashed_uniform
from svite_scale.sparsity.layers.base import LayerContext, SparseLayer, UnitParameter
from svite_scale.sparsity.layers.units import UnitLayer
from svite_scale.sparsity.options import Method, TopologyOptions
from svite_scale.sparsity.topology.growth import GrowthScores
from svite_scale.sparsity.topology.methods import Candidates, Score
from svite_scale.sparsity.transition import TopologyTransition, grown_moment
from svite_scale.sparsity.update import drop, grow


@dataclass(frozen=True)
class LayerDecision:
    """The next topology of a layer.

    Attributes:
        count: units dropped, and units grown.
        old_mask: uint8 ``[ceil(N / 8)]``, before the update.
        new_mask: the same, after it.
        drop_threshold: largest score dropped; None where ``count`` is 0.
        grow_threshold: smallest score grown; None where ``count`` is 0.
    """

    count: int
    old_mask: Tensor
    new_mask: Tensor
    drop_threshold: float | None
    grow_threshold: float | None


def num_moved(layer: SparseLayer, drop_fraction: float, step: int, seed: int) -> int:
    """Returns how many units an update at ``step`` drops and grows in a layer.

    Of weights and blocks this is ceil(drop_fraction * k), at least one to the last update. A layer has few heads, and one of
    three is much. So for heads and neurons drop_fraction * k is rounded up or down at random, such that it is the expectation:
    by a hash of (seed, step, layer). An update moves at most :attr:`~svite_scale.sparsity.layers.units.UnitLayer.max_moved`.
    """
    if not isinstance(layer, UnitLayer):
        return min(math.ceil(drop_fraction * layer.num_active), layer.num_active)
    uniform = float(hashed_uniform(seed, step, f"{layer.name}/moved", 1))
    count = math.floor(drop_fraction * layer.num_active + uniform)
    return count if layer.max_moved is None else min(count, layer.max_moved)


def decide(
    layer: SparseLayer,
    method: Method,
    count: int,
    step: int,
    options: TopologyOptions,
    access: ParameterAccess,
    growth: GrowthScores,
    recently_grown: Tensor | None = None,
) -> LayerDecision:
    """Returns what a method does to a layer, the same on every rank. Changes nothing. A collective.

    Args:
        layer: the layer.
        method: scores its units.
        count: units to drop and to grow.
        step: optimizer steps done.
        options: of the engine.
        access: reads the layer's parameters.
        growth: holds its recorded gradients.
        recently_grown: bool ``[k]``, active units that are protected from being dropped; None protects none.

    Raises:
        TopologyError: a score is NaN or has the wrong shape; the message names the layer.
    """
    mask = access.read(layer.mask).clone()
    context = LayerContext(layer, mask, access, growth)
    active = bits.unpack(mask, layer.shape.numel())
    protected = None if recently_grown is None else torch.zeros_like(active).masked_scatter_(active, recently_grown)

    def scores(score: Score, eligible: Tensor) -> Tensor:
        return score(Candidates(context, step, options.seed, count, eligible, options.random_share))

    try:
        active, drop_threshold = drop(active, scores(method.drop, active), count, protected)
        active, grow_threshold = grow(active, scores(method.grow, ~active), count)
    except TopologyError as error:
        raise TopologyError(f"topology update of {layer.name} after step {step}: {error}") from error
    return LayerDecision(count, mask, bits.pack(active), drop_threshold, grow_threshold)


def write_topology(
    layer: SparseLayer,
    transition: TopologyTransition,
    access: ParameterAccess,
    options: TopologyOptions,
    tracked: Sequence[TrackedTensors] = (),
) -> None:
    """Brings a layer's parameters, their optimizer state and the tracked tensors to the new mask, one tensor at a time.

    A collective.
    """
    initial_rows = layer.initial_rows(transition)
    for key, part in layer.unit_parameters().items():
        parameter, initial = part.parameter, initial_rows.get(key, 0.0)
        for tensors in (access, *tracked):
            tensors.write(parameter, _remap(transition, part, tensors.read(parameter), initial))
        for name in access.moment_names(parameter):
            moment = access.read_moment(parameter, name)
            grown = grown_moment(name, moment, options.grown_moments, initial, options.optimizer_state)
            access.write_moment(parameter, name, _remap(transition, part, moment, grown))
    access.write(layer.mask, transition.new)


def _remap(transition: TopologyTransition, part: UnitParameter, packed: Tensor, grown: float | Tensor) -> Tensor:
    if part.repeats == part.row_numel == 1:
        return transition.remap(packed, grown)
    return transition.remap_rows(packed, part.repeats, grown)
