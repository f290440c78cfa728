"""What moves the weights: a method is a pair of scores, one that drops and one that grows.

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
from svite_scale.sparsity.options import Method
from svite_scale.sparsity.update import choose


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One layer's weights when some are to be dropped, or grown, and what a score may ask about them.

    Attributes:
        name: of the layer.
        step: optimizer steps done.
        seed: of the run.
        count: weights to choose.
        eligible: bool ``[N]``, the weights to choose from: the active ones to drop, or the inactive ones to grow, those just
            dropped included.
        random_share: of the config, 0 to 1.
        read_values: see :meth:`values`.
        read_gradient: see :meth:`gradient`.
    """

    name: str
    step: int
    seed: int
    count: int
    eligible: Tensor
    random_share: float
    read_values: Callable[[], Tensor]
    read_gradient: Callable[[], Tensor]

    def values(self) -> Tensor:
        """The dense weight before the update, fp32 ``[N]``, 0 where inactive; a new tensor at each call."""
        return self.read_values()

    def gradient(self) -> Tensor:
        """Magnitude of the dense gradient, averaged over the growth window, fp32 ``[N]``; a new tensor at each call.

        A collective at each call, which is one on all ranks: they all score alike.
        """
        return self.read_gradient()

    def random(self) -> Tensor:
        """Uniform random numbers by (seed, step, layer, flat position), fp32 ``[N]``."""
        return hashed_uniform(self.seed, self.step, self.name, self.eligible.numel(), self.eligible.device)


Score = Callable[[Candidates], Tensor]
"""Float ``[N]``, read where eligible: the smallest scores drop, the largest grow."""


def magnitude(candidates: Candidates) -> Tensor:
    """|weight|."""
    return candidates.values().abs_()


def gradient_magnitude(candidates: Candidates) -> Tensor:
    """|dense gradient| (RigL, arXiv:1911.11134; the SViTE paper's choice)."""
    return candidates.gradient()


def uniform_random(candidates: Candidates) -> Tensor:
    """Any weight as well as any other (SET, Mocanu et al. 2018)."""
    return candidates.random()


def partly_random(candidates: Candidates) -> Tensor:
    """``random_share`` of the weights at random, the others by gradient."""
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
