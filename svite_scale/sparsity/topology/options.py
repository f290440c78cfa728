"""How a topology engine moves weights; when is the schedule's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from svite_scale.sparsity.topology.growth import GROW_BY
from svite_scale.sparsity.topology.methods import METHODS, Method
from svite_scale.sparsity.transition import STATE_KINDS

GROWN_MOMENTS = ("mean", "zero")


@dataclass(frozen=True, kw_only=True)
class TopologyOptions:
    """Options of a topology engine.

    Args:
        method: which weights go and which come: a name of :data:`~svite_scale.sparsity.topology.methods.METHODS`, or a pair
            of scores.
        random_share: share of the grown weights that ``mixed`` draws at random.
        seed: of what methods draw.
        grow_window: optimizer steps before an update, its own included, whose gradients are averaged.
        grow_by: ``gradient`` grows by |mean of the window's gradients|, ``magnitude`` by the mean of their magnitudes.
        grown_moments: second moment of a grown weight: its layer's ``mean``, or ``zero``. First moments start at zero.
        grown_warmup_steps: optimizer steps over which the learning rate of grown weights rises to the others'; 0 is off.
        optimizer_state: what elementwise optimizer state of an unknown name is: by name, one of
            :data:`~svite_scale.sparsity.transition.STATE_KINDS`.
    """

    method: str | Method = "svite"
    random_share: float = 0.5
    seed: int = 0
    grow_window: int = 1
    grow_by: str = "gradient"
    grown_moments: str = "mean"
    grown_warmup_steps: int = 0
    optimizer_state: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("grow_by", GROW_BY), ("grown_moments", GROWN_MOMENTS)):
            value = getattr(self, name)
            if value not in tuple(known) and not (name == "method" and isinstance(value, Method)):
                own = ", or a Method of your own" if name == "method" else ""
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}{own}")
        for name, kind in self.optimizer_state.items():
            if kind not in STATE_KINDS:
                raise ValueError(f"optimizer_state {name!r} is {kind!r}; use one of {', '.join(STATE_KINDS)}")
        for name in ("seed", "grow_window", "grown_warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise ValueError(f"{name} ({value!r}) must be a whole number, an int")
        if not (isinstance(self.random_share, Real) and 0.0 <= self.random_share <= 1.0):
            raise ValueError(f"random_share ({self.random_share!r}) must be a number in [0, 1]")
        if self.grow_window < 1:
            raise ValueError(f"grow_window ({self.grow_window}) must be at least 1")
        if self.grown_warmup_steps < 0:
            raise ValueError(f"grown_warmup_steps ({self.grown_warmup_steps}) must be at least 0")

    @property
    def scores(self) -> Method | None:
        """The method's pair of scores; None where no weight moves."""
        return METHODS[self.method] if isinstance(self.method, str) else self.method
