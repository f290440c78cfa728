"""The engine that moves the active weights during training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.access import ParameterAccess
from svite_scale.sparsity.ever_active import EverActive
from svite_scale.sparsity.growth import GrowthScores
from svite_scale.sparsity.layers import PackedLayer, packed_layers
from svite_scale.sparsity.remap import remap_moments, remap_values
from svite_scale.sparsity.schedules import UpdateSchedule
from svite_scale.sparsity.update import prune_and_grow

GROWN_MOMENTS = ("mean", "zero")


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer: ``dropped`` weights went and as many came, ``regrown`` of them the very ones that
    went.
    """

    dropped: int
    regrown: int


@dataclass(frozen=True)
class TopologyUpdate:
    """What one update did.

    Attributes:
        step: the optimizer step after which it came.
        rate: share of each layer's active weights that was dropped and grown.
        ever_active: share of all packed weights that have been active at any time.
        layers: by layer name.
    """

    step: int
    rate: float
    ever_active: float
    layers: dict[str, LayerUpdate] = field(repr=False)


class TopologyEngine:
    """Prunes and grows the packed layers of a model on a schedule (the paper's Algorithm 1; DESIGN section 3).

    After an update step's optimizer step, layer by layer: drop the active weights with the smallest magnitude, grow the
    inactive ones with the largest gradient of that step, averaged over ranks and micro-batches. The number of active weights
    of a layer never changes, so neither does any shape. A weight that is dropped and grown in one update keeps its value and
    moments; other grown weights start at 0.

    Attributes:
        steps: optimizer steps seen so far.
        ever_active: the weights that have ever been active.
    """

    def __init__(
        self,
        model: nn.Module,
        access: ParameterAccess,
        schedule: UpdateSchedule,
        *,
        grown_moments: str = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """A collective: all ranks build their engine after the model is wrapped.

        Args:
            model: holds packed layers; wrapped by an engine or not.
            access: reads and writes the wrapped model's parameters.
            schedule: when weights move, and how many.
            grown_moments: second moment of a grown weight: its layer's ``mean``, or ``zero``. First moments start at zero.
            group: the data-parallel ranks; None where ``torch.distributed`` isn't in use.
        """
        if grown_moments not in GROWN_MOMENTS:
            raise ValueError(f"grown_moments {grown_moments!r} is unknown; use one of {', '.join(GROWN_MOMENTS)}")
        self.layers = packed_layers(model)
        self.access = access
        self.schedule = schedule
        self.grown_moments = grown_moments
        self.steps = 0
        self.scores = GrowthScores(self.layers.values(), group)
        self.ever_active = EverActive(self.layers.values(), group)
        for layer in self.layers.values():
            self.ever_active.mark(layer, access.read(layer.mask))
        self._listen()

    @property
    def rate(self) -> float:
        """Share of the active weights that an update now would move; 0 after the last update."""
        return self.schedule.rate(self.steps) if self.layers and self.steps <= self.schedule.stop_step else 0.0

    def step(self) -> TopologyUpdate | None:
        """Counts one optimizer step, and updates the topology if one is due. Call it right after each optimizer step.

        A collective on update steps: all ranks call it.

        Returns:
            What changed, or None where no update was due.

        Raises:
            TopologyError: a score is NaN, or no gradient reached a layer; the message names the layer.
        """
        self.steps += 1
        update = self._update() if self.layers and self.schedule.is_update(self.steps) else None
        self._listen()
        return update

    def resume(self, steps: int) -> None:
        """Goes on after ``steps`` optimizer steps, as a loaded checkpoint says."""
        self.steps = steps
        self._listen()

    def _listen(self) -> None:
        """Collects growth scores during the next step if an update follows it, and only then."""
        if self.schedule.is_update(self.steps + 1):
            self.scores.start()
        else:
            self.scores.stop()

    @torch.no_grad()
    def _update(self) -> TopologyUpdate:
        rate = self.schedule.rate(self.steps)
        layers = {name: self._update_layer(layer, rate) for name, layer in self.layers.items()}
        return TopologyUpdate(self.steps, rate, self.ever_active.fraction(), layers)

    def _update_layer(self, layer: PackedLayer, rate: float) -> LayerUpdate:
        """One layer's update; the layer's dense scores live only in here."""
        count = num_moved(layer.num_active, rate)
        values = self.access.read(layer.values)
        active = bits.unpack(self.access.read(layer.mask), layer.shape.numel())
        magnitude = values.new_zeros(active.numel()).masked_scatter_(active, values.abs())
        try:
            topology = prune_and_grow(active, magnitude, self.scores.gather(layer), count)
        except TopologyError as error:
            raise TopologyError(f"topology update of {layer.name} after step {self.steps}: {error}") from error
        kept = int((active & topology).sum())
        self._write_layer(layer, values, active, topology)
        came = layer.num_active - kept
        return LayerUpdate(dropped=count, regrown=count - came)

    def _write_layer(self, layer: PackedLayer, values: Tensor, active: Tensor, topology: Tensor) -> None:
        moments = self.access.read_moments(layer.values)
        self.access.write(layer.values, remap_values(values, active, topology))
        self.access.write_moments(layer.values, remap_moments(moments, active, topology, self.grown_moments))
        mask = bits.pack(topology)
        self.access.write(layer.mask, mask)
        self.ever_active.mark(layer, mask)


def num_moved(num_active: int, rate: float) -> int:
    """Weights that an update drops and grows in a layer: ceil(rate * active)."""
    return min(math.ceil(rate * num_active), num_active)
