"""Statistics of a run's topology, and the summary of one update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.sharding import gather_chunks, rank_and_size, rank_chunk
from svite_scale.sparsity.transition import TopologyTransition

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """Summary of an update of one layer.

    Attributes:
        unit: what N and the figures below count: ``weights``, ``blocks``, ``neurons`` or ``heads``.
        numel: all units, N.
        num_active: active units, k.
        drop_fraction: fraction of them to drop and grow, of heads and neurons in expectation; 0 where the layer is frozen.
        dropped: units dropped, those that were grown again at once included.
        regrown: units dropped and grown by the same update; they never left.
        grown_survival: fraction of the units grown by the previous update that are still active; None where there were none.
        drop_threshold: largest score that was dropped (|weight|, by most methods); None where none was.
        grow_threshold: smallest score that was grown (|gradient|, by default; infinite where ``mixed`` grew all at random).
        ever_active: units that have been active at any time.
        initial_survivors: units that have been active since training began.
    """

    unit: str
    numel: int
    num_active: int
    drop_fraction: float = 0.0
    dropped: int = 0
    regrown: int = 0
    grown_survival: float | None = None
    drop_threshold: float | None = None
    grow_threshold: float | None = None
    ever_active: int = 0
    initial_survivors: int = 0

    @property
    def grown(self) -> int:
        """Units that are active now and weren't before; as many left."""
        return self.dropped - self.regrown

    def metrics(self) -> Metrics:
        """Returns the figures by name, but for those that are None or not finite."""
        figures = {
            "density": self.num_active / self.numel,
            "dropped": self.dropped,
            "grown": self.grown,
            "regrown": self.regrown,
            "initial_survival": self.initial_survivors / self.num_active,
            "ever_active": self.ever_active / self.numel,
            "drop_threshold": self.drop_threshold,
            "grow_threshold": self.grow_threshold,
            "grown_survival": self.grown_survival,
        }
        # The threshold of weights that a method forces is infinite, and JSON has no infinities.
        return {figure: value for figure, value in figures.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class TopologyUpdate:
    """Summary of one update.

    Attributes:
        step: the optimizer step after which it came.
        drop_fraction: fraction of the active weights, and blocks, that was dropped and grown; see :class:`LayerUpdate` for that
            of heads and neurons.
        layers: by layer name.
        unit_masks: of heads and neurons after it; see :meth:`~svite_scale.sparsity.topology.engine.TopologyEngine.unit_masks`.
    """

    step: int
    drop_fraction: float
    layers: Mapping[str, LayerUpdate] = field(repr=False)
    unit_masks: Mapping[str, bytes] = field(repr=False)

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of units that the layers count, each once."""
        return tuple(dict.fromkeys(layer.unit for layer in self.layers.values()))

    def ever_active(self, unit: str = "weights") -> float:
        """Returns the fraction of the units of a kind that have been active at any time: of weights, the in-time
        over-parameterization rate R_s of Liu et al. (arXiv:2102.02887).

        Raises:
            TopologyError: no layer counts these units; names those in :attr:`units`.
        """
        layers = self._layers_of(unit)
        return sum(layer.ever_active for layer in layers) / sum(layer.numel for layer in layers)

    def initial_survival(self, unit: str = "weights") -> float:
        """Returns the fraction of the active units of a kind that have been active since training began; see
        :meth:`ever_active`.
        """
        layers = self._layers_of(unit)
        return sum(layer.initial_survivors for layer in layers) / sum(layer.num_active for layer in layers)

    def metrics(self) -> Metrics:
        """Returns totals by name, those of blocks, heads and neurons as ``blocks/<name>`` and the like, and each layer's
        figures as ``layers/<figure>/<layer>``.
        """
        metrics: Metrics = {}
        for unit in self.units:
            prefix = "" if unit == "weights" else f"{unit}/"
            metrics |= {prefix + name: value for name, value in self._totals(unit).items()}
        for name, layer in self.layers.items():
            metrics |= {f"layers/{figure}/{name}": value for figure, value in layer.metrics().items()}
        return metrics

    def _layers_of(self, unit: str) -> list[LayerUpdate]:
        layers = [layer for layer in self.layers.values() if layer.unit == unit]
        if not layers:
            raise TopologyError(f"no layer counts {unit!r}; choose one of {', '.join(self.units)}")
        return layers

    def _totals(self, unit: str) -> Metrics:
        layers = self._layers_of(unit)
        return {
            "drop_fraction": max(layer.drop_fraction for layer in layers),
            "dropped": sum(layer.dropped for layer in layers),
            "grown": sum(layer.grown for layer in layers),
            "regrown": sum(layer.regrown for layer in layers),
            "initial_survival": self.initial_survival(unit),
            "ever_active": self.ever_active(unit),
        }


class Statistics:
    """Two sets of bits for every sparse layer, of which each rank keeps its chunk.

    Attributes:
        history: by layer name, a chunk of uint8 ``[ceil(N / 8)]``. The bit of an active unit says whether it has been active
            since training began, the bit of an inactive one whether it has ever been active.
        recently_grown: by layer name, a chunk of uint8 ``[ceil(k / 8)]``, in the order of ``values``: the active units that the
            last update grew. A unit that is dropped and grown by the same update isn't one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Starts without layers. ``group`` is the data-parallel ranks, None without ``torch.distributed``."""
        self.group = group
        self.history: dict[str, Tensor] = {}
        self.recently_grown: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._rank, self._world_size = rank_and_size(group)

    def add(self, layer: SparseLayer, mask: Tensor) -> None:
        """Starts the statistics of a layer, whose mask is uint8 ``[ceil(N / 8)]``. Local."""
        self.history[layer.name] = self._chunk(mask)
        self._write_grown(layer, torch.zeros(layer.num_active, dtype=torch.bool, device=mask.device))

    def read_grown(self, layer: SparseLayer) -> Tensor:
        """Returns which active units the last update grew, bool ``[k]``, on every rank. A collective."""
        whole = gather_chunks(self.recently_grown[layer.name], bits.num_bytes(layer.num_active), self.group)
        return bits.unpack(whole, layer.num_active)

    def apply(self, layer: SparseLayer, transition: TopologyTransition) -> float | None:
        """Brings a layer's statistics to a new topology. A collective.

        Returns:
            Fraction of the units grown by the previous update that are still active; None where there were none.
        """
        grown = self.read_grown(layer)
        num_grown, num_kept = int(grown.count_nonzero()), int(transition.remap(grown, False).count_nonzero())
        self._write_grown(layer, ~transition.kept)
        self._mark(layer, transition.old, transition.new)
        return num_kept / num_grown if num_grown else None

    def keep(self, layer: SparseLayer, mask: Tensor) -> None:
        """Notes that an update left a layer as it was, with this mask, uint8 ``[ceil(N / 8)]``. Local."""
        self._write_grown(layer, torch.zeros(layer.num_active, dtype=torch.bool, device=mask.device))
        self._mark(layer, mask, mask)

    def count_history(self) -> dict[str, tuple[int, int]]:
        """Returns, by layer of the last update, the units that have been active at any time, and those that have been active
        since training began. A collective.
        """
        counts = torch.stack(list(self._counts.values()))
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return {name: (ever, initial) for name, (ever, initial) in zip(self._counts, counts.tolist(), strict=True)}

    def _mark(self, layer: SparseLayer, old_mask: Tensor, new_mask: Tensor) -> None:
        old, new, history = self._chunk(old_mask), self._chunk(new_mask), self.history[layer.name]
        self.history[layer.name] = history = (new & old & history) | (~new & (old | history))
        self._counts[layer.name] = torch.stack([_count(new | history), _count(new & history)])

    def _chunk(self, mask: Tensor) -> Tensor:
        return rank_chunk(mask, self._rank, self._world_size).clone()

    def _write_grown(self, layer: SparseLayer, grown: Tensor) -> None:
        self.recently_grown[layer.name] = self._chunk(bits.pack(grown))


def _count(marks: Tensor) -> Tensor:
    """Returns the number of bits set, as an int64 scalar."""
    return bits.unpack(marks, marks.numel() * 8).count_nonzero()
