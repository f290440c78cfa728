"""What one topology update did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from svite_scale.sparsity.topology.history import HistoryCounts

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """What an update did to one layer.

    Attributes:
        unit: what N and the figures below count: ``weights``, ``neurons`` or ``heads``.
        numel: all there are, N.
        num_active: active ones, k.
        dropped: weights that went, those that came back at once included.
        regrown: of them, those that the same update grew again; they never left.
        grown_survival: of the weights grown at the update before, the share still active; None where there were none.
        drop_threshold: largest score that was dropped (|weight|, by most methods); None where none was.
        grow_threshold: smallest score that was grown (|gradient|, by default; infinite where ``mixed`` grew all at random).
    """

    unit: str
    numel: int
    num_active: int
    dropped: int = 0
    regrown: int = 0
    grown_survival: float | None = None
    drop_threshold: float | None = None
    grow_threshold: float | None = None

    @property
    def grown(self) -> int:
        """Weights that came and weren't there before; as many left."""
        return self.dropped - self.regrown


@dataclass(frozen=True)
class TopologyUpdate:
    """What one update did.

    Attributes:
        step: the optimizer step after which it came.
        rate: share of each layer's active weights that was dropped and grown.
        layers: by layer name.
        history: by layer name, how many weights have ever been active, and how many since training began.
        unit_masks: of heads and neurons after it; see :meth:`~svite_scale.sparsity.topology.engine.TopologyEngine.unit_masks`.
    """

    step: int
    rate: float
    layers: Mapping[str, LayerUpdate] = field(repr=False)
    history: Mapping[str, HistoryCounts] = field(repr=False)
    unit_masks: Mapping[str, bytes] = field(repr=False)

    @property
    def units(self) -> tuple[str, ...]:
        """What the layers' figures count, each kind once."""
        return tuple(dict.fromkeys(layer.unit for layer in self.layers.values()))

    def ever_active(self, unit: str = "weights") -> float:
        """Share of all units of a kind that have been active at any time; of weights, the in-time over-parameterization."""
        layers = self._layers_of(unit)
        return sum(self.history[name].ever_active for name in layers) / sum(layer.numel for layer in layers.values())

    def initial_survival(self, unit: str = "weights") -> float:
        """Share of the active units of a kind that have been active since training began."""
        layers = self._layers_of(unit)
        survivors = sum(self.history[name].initial_survivors for name in layers)
        return survivors / sum(layer.num_active for layer in layers.values())

    def metrics(self) -> Metrics:
        """Totals by name, those of heads and neurons as ``heads/<name>`` and ``neurons/<name>``, and each layer's figures as
        ``layers/<figure>/<layer>`` where there is one, and it is finite.
        """
        totals: Metrics = {}
        for unit in self.units:
            prefix = "" if unit == "weights" else f"{unit}/"
            totals |= {prefix + name: value for name, value in self._totals(unit).items()}
        for name in self.layers:
            totals |= {f"layers/{figure}/{name}": value for figure, value in self._layer_metrics(name).items()}
        return totals

    def _layers_of(self, unit: str) -> dict[str, LayerUpdate]:
        return {name: layer for name, layer in self.layers.items() if layer.unit == unit}

    def _totals(self, unit: str) -> Metrics:
        layers = self._layers_of(unit).values()
        return {
            "dropped": sum(layer.dropped for layer in layers),
            "grown": sum(layer.grown for layer in layers),
            "regrown": sum(layer.regrown for layer in layers),
            "initial_survival": self.initial_survival(unit),
            "ever_active": self.ever_active(unit),
        }

    def _layer_metrics(self, name: str) -> Metrics:
        layer = self.layers[name]
        figures = {
            "density": layer.num_active / layer.numel,
            "dropped": layer.dropped,
            "grown": layer.grown,
            "regrown": layer.regrown,
            "initial_survival": self.history[name].initial_survivors / layer.num_active,
            "ever_active": self.history[name].ever_active / layer.numel,
            "drop_threshold": layer.drop_threshold,
            "grow_threshold": layer.grow_threshold,
            "grown_survival": layer.grown_survival,
        }
        # Of weights that a method forces, the threshold is infinite, and JSON has no infinities.
        return {figure: value for figure, value in figures.items() if value is not None and math.isfinite(value)}
