"""How many weights are active and where, which of them move, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf

from svite_scale.errors import OptionError
from svite_scale.options import options, refuse_unused

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Density = Annotated[float, Field(gt=0.0, le=1.0)]

FROM_WEIGHTS = "from_weights"
"""The value of ``masks`` that takes the zeros of the weights."""

UNIT_DROP_FRACTION = 0.0
"""Default of the drop fraction of heads and neurons: a fixed topology wins in docs/accuracy.md."""

METHODS = ("svite", "set", "mixed", "static", "dense")
"""The built-in methods; :mod:`svite_scale.sparsity.topology.methods` has their scores."""

StateKind = Literal["gradient", "magnitude", "weight", "step_size"]
"""What an entry of an optimizer's state is to its weight: a gradient, or an average or sum of them; an average or sum of their
squares or magnitudes; another copy of the weight, where an average of weights begins, say; the size of its steps."""


@options
class Allocation:
    """The active weights: number and places, given by one of ``density``, ``densities`` and ``masks``, and first values."""

    density: Density = 1.0
    """Fraction of the prunable weights that is active; 1.0 trains the ordinary dense model."""
    distribution: Literal["uniform", "er", "erk"] = "erk"
    """The rule that spreads ``density`` over the layers."""
    power_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Exponent of ERK's ratio."""
    densities: dict[str, Density] = field(default_factory=dict, hash=False)
    """Instead of ``density``: a layer's own, by pattern of its name (``blocks.*.attn.qkv``); the first that matches decides."""
    masks: str | None = None
    """Instead of ``density``: a safetensors file of one tensor of 0 and 1 per layer, named as in the dense state dict. Or
    ``from_weights``: weights that are 0 are inactive, for a model that is pruned already."""
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    """Rows and columns of the blocks in which weights are active or inactive: with blocks of 16 rows or more the time of a step
    falls with density. Layers that they don't divide keep single weights, as [1, 1] does everywhere."""
    keep_dense: tuple[str, ...] = ()
    """Patterns of layers that aren't made sparse and don't count in ``density``."""
    init: Literal["fan_in", "dense"] = "fan_in"
    """First values of active weights that are drawn. ``fan_in`` multiplies the dense model's values by the root of a layer's
    inputs over its active inputs, so that outputs keep their spread; ``dense`` takes the values as they are. Weights from a
    file aren't changed."""

    def __post_init__(self) -> None:
        if self.densities and self.masks is not None:
            problem = "also says where the weights are, as densities does"
            raise OptionError("masks", self.masks, problem, "leave one of them out")
        instead = "densities" if self.densities else "masks" if self.masks is not None else None
        if instead and self.density != 1.0:
            remedy = f"set it to 1.0, or leave {instead} out"
            raise OptionError("density", self.density, f"isn't used where {instead} is given", remedy)
        if instead:
            refuse_unused(self, "distribution", f"isn't used where {instead} is given")
        if instead or self.distribution != "erk":
            refuse_unused(self, "power_scale", "is only for a density that is spread by erk")


@options
class DropSchedule:
    """The fraction of the active weights that a topology update moves, and the end of the updates."""

    stop_fraction: Fraction = 0.8
    """Topology updates stop at this fraction of all optimizer steps."""
    drop_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From ``drop_fraction`` at the start to ``final_drop_fraction`` at the stop; ``constant`` stays at the former."""
    drop_fraction: Fraction = 0.5
    """Fraction of the active weights dropped at an update, at the start."""
    final_drop_fraction: Fraction = 0.005
    """The same at ``stop_fraction`` of training, where the schedule ends."""

    def __post_init__(self) -> None:
        if self.drop_schedule == "constant":
            refuse_unused(self, "final_drop_fraction", "isn't used by drop_schedule=constant")
        elif self.final_drop_fraction > self.drop_fraction:
            problem = f"is above drop_fraction ({self.drop_fraction}), but the schedule falls"
            raise OptionError("final_drop_fraction", self.final_drop_fraction, problem, "lower it")


@dataclass(frozen=True)
class Method:
    """A method of one's own: the weights of smallest ``drop`` score go, those of largest ``grow`` score come.

    Each is a :data:`~svite_scale.sparsity.topology.methods.Score`.
    """

    drop: Callable[[Any], Any]
    grow: Callable[[Any], Any]


@options
class MethodOptions:
    """The rule by which a topology update chooses weights, and how the grown ones start."""

    method: str | InstanceOf[Method] = "svite"
    """``svite`` drops by magnitude and grows by gradient, ``set`` grows at random, ``mixed`` does both, ``static`` keeps the
    first mask, ``dense`` trains the ordinary dense model, whatever the density. Or ``my_package.my_module:my_method``, a
    :class:`Method`."""
    random_share: Fraction = 0.5
    """Fraction of the grown weights that ``mixed`` draws at random."""
    grow_window: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps before an update, its own included, whose gradients are averaged to choose what grows."""
    grow_by: Literal["gradient", "magnitude"] = "gradient"
    """|mean of the window's gradients|, or the mean of their magnitudes."""
    grown_moments: Literal["mean", "zero"] = "mean"
    """Second moment of a grown weight: its layer's mean, or zero. First moments start at zero."""
    grown_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate of grown weights rises to the others'; 0 is off."""
    protect_grown: bool = False
    """Whether weights, blocks, heads and neurons that an update has grown can't be dropped at the next one, as long as enough
    others are active."""

    def __post_init__(self) -> None:
        if isinstance(self.method, str) and self.method not in METHODS and ":" not in self.method:
            own = ", or MODULE:NAME of a Method of your own"
            raise OptionError("method", self.method, "is no method", f"use one of {', '.join(METHODS)}{own}")
        if self.method in METHODS and self.method != "mixed":
            refuse_unused(self, "random_share", f"isn't used by method={self.method}")

    def refuse_long_windows(self, update_every: int) -> None:
        """Refuses windows that reach from one update to the next, ``update_every`` optimizer steps later.

        Raises:
            OptionError: names the window and both numbers.
        """
        for name in ("grow_window", "grown_warmup_steps"):
            steps = getattr(self, name)
            if steps > update_every:
                problem = f"is longer than the {update_every} steps between two updates"
                raise OptionError(name, steps, problem, "shorten it, or raise update_every")


@options
class TopologyOptions(MethodOptions):
    """Options of a topology engine: the method, and what a config has in other places or doesn't need."""

    seed: int = 0
    """Of what methods draw. A config has one seed for the whole run."""
    optimizer_state: dict[str, StateKind] = field(default_factory=dict, hash=False)
    """Kinds of elementwise optimizer state, by names that the library doesn't know."""
