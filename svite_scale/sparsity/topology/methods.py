"""Methods: pairs of scores, one by which weights are dropped and one by which they are grown.

A score is a function of a layer's :class:`Candidates` that returns a float for every position of the weight. A method of your
own is a :class:`~svite_scale.sparsity.options.Method` of two of them; docs/methods.md shows one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from svite_scale.errors import OptionError
from svite_scale.sparsity.hashing import hashed_uniform
from svite_scale.sparsity.layers.base import LayerContext
from svite_scale.sparsity.options import Method
from svite_scale.sparsity.update import choose


@dataclass(frozen=True)
class Candidates:
    """One layer's weights when some are to be dropped, or grown, and what a score may ask about them.

    Attributes:
        layer: the layer, and the way to its tensors.
        step: optimizer steps done.
        seed: of the run.
        count: weights to choose.
        eligible: bool ``[N]``, the weights to choose from: the active ones to drop, or the inactive ones to grow, those just
            dropped included.
        random_share: see :attr:`~svite_scale.sparsity.options.MethodOptions.random_share`.
    """

    layer: LayerContext
    step: int
    seed: int
    count: int
    eligible: Tensor
    random_share: float

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    def values(self) -> Tensor:
        """Returns the dense weight before the update, fp32 ``[N]``, 0 where inactive; a new tensor. Of blocks, their L2 norms;
        of heads and neurons, their importance. A collective.
        """
        return self.layer.importance()

    def gradient(self) -> Tensor:
        """Returns the magnitude of the dense gradient, averaged over the growth window, fp32 ``[N]``; a new tensor. Of blocks,
        its L2 norms; of heads and neurons, their growth scores. A collective.
        """
        return self.layer.growth_scores()

    def random(self) -> Tensor:
        """Returns uniform random numbers by (seed, step, layer, flat position), fp32 ``[N]``."""
        return hashed_uniform(self.seed, self.step, self.name, self.eligible.numel(), self.eligible.device)


Score = Callable[[Candidates], Tensor]
"""Returns float ``[N]``, read where eligible: units of the smallest scores are dropped, of the largest grown."""


def magnitude(candidates: Candidates) -> Tensor:
    """Scores by |weight|."""
    return candidates.values().abs_()


def gradient_magnitude(candidates: Candidates) -> Tensor:
    """Scores by |dense gradient| (RigL, arXiv:1911.11134; the SViTE paper's choice)."""
    return candidates.gradient()


def uniform_random(candidates: Candidates) -> Tensor:
    """Scores at random (SET, Mocanu et al. 2018)."""
    return candidates.random()


def partly_random(candidates: Candidates) -> Tensor:
    """Chooses ``random_share`` of the weights at random, the others by gradient."""
    num_random = round(candidates.random_share * candidates.count)
    chosen, _ = choose(candidates.eligible, candidates.random(), num_random, "grow")
    return candidates.gradient().masked_fill_(chosen, torch.inf)


METHODS: dict[str, Method | None] = {
    "svite": Method(drop=magnitude, grow=gradient_magnitude),
    "set": Method(drop=magnitude, grow=uniform_random),
    "mixed": Method(drop=magnitude, grow=partly_random),
    "static": None,  # the random mask stays as it was drawn
    "dense": None,  # no mask at all: nothing is packed
}
"""By the name in the options; None where no weight moves."""


def find_method(method: str | Method) -> Method | None:
    """Returns the pair of scores that :attr:`~svite_scale.sparsity.options.MethodOptions.method` names; None if nothing moves.

    Raises:
        OptionError: ``MODULE:NAME`` can't be imported, or isn't a Method.
    """
    if isinstance(method, Method):
        return method
    if method in METHODS:
        return METHODS[method]
    module, _, name = method.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever the module raises
        problem = f"can't be imported ({type(error).__name__}: {error})"
        raise OptionError("method", method, problem, "check the name, and that PYTHONPATH has its folder") from error
    if not isinstance(found, Method):
        raise OptionError("method", method, f"is of type {type(found).__name__}, and no Method", "name a svite_scale.Method")
    return found
