"""How a global density is spread over layers, as densities and as exact integer counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density for every layer.

    Args:
        shapes: weight shape of each layer.
        density: global density, in (0, 1].
    """
    _check(shapes, density)
    return dict.fromkeys(shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: a layer's density is proportional to the sum of its dimensions over their product.

    Layers whose share would pass 1 are dense, and the others take up the difference, so that the active weights over all
    layers are ``density`` of the total.

    Args:
        shapes: weight shape of each layer, ``[out, in]`` or ``[out, in, *kernel]``.
        density: global density, in (0, 1].

    Source: Evci et al., "Rigging the Lottery" (arXiv:1911.11134), section 3; used by the SViTE paper.
    """
    _check(shapes, density)
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    ratio = {name: sum(shape) / numel[name] for name, shape in shapes.items()}
    budget = density * sum(numel.values())
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        if not sparse:
            return dict.fromkeys(shapes, 1.0)
        remaining = budget - sum(numel[name] for name in dense)
        scale = remaining / sum(ratio[name] * numel[name] for name in sparse)
        over = {name for name in sparse if scale * ratio[name] > 1.0}
        if not over:
            return {name: 1.0 if name in dense else scale * ratio[name] for name in shapes}
        # Each layer held at 1 raises the others' scale, so all that are over stay over.
        dense |= over


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"uniform": uniform, "erk": erk}


def counts(shapes: Shapes, densities: Mapping[str, float]) -> dict[str, int]:
    """Exact numbers of active weights, whose sum is the rounded global budget.

    Each layer gets the floor of its share; what the floors leave goes one weight at a time to the largest remainders (ties to
    the earlier layer). So no layer is a whole weight off its share, except that each keeps at least one weight.

    Args:
        shapes: weight shape of each layer.
        densities: density of each layer, in (0, 1].
    """
    share = {name: densities[name] * math.prod(shape) for name, shape in shapes.items()}
    result = {name: max(1, math.floor(value)) for name, value in share.items()}
    missing = round(sum(share.values())) - sum(result.values())
    by_remainder = sorted(share, key=lambda name: result[name] - share[name])
    for name in by_remainder[: max(missing, 0)]:
        result[name] += 1
    return {name: min(count, math.prod(shapes[name])) for name, count in result.items()}


def _check(shapes: Shapes, density: float) -> None:
    if not shapes:
        raise ValueError("no layer to distribute a density over")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density ({density}) must be in (0, 1]")
