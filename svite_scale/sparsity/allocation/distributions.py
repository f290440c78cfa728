"""Distributions of a global density over layers, as densities and as exact integer counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Returns the same density for every layer.

    Args:
        shapes: weight shape of each layer.
        density: global density, in (0, 1].
    """
    _check(shapes, density)
    return dict.fromkeys(shapes, density)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Returns Erdos-Renyi densities: a layer's is proportional to (fan in + fan out) / (fan in * fan out), whatever its kernel.

    A layer whose density would pass 1 is dense, and the others take up the difference.

    Args:
        shapes: weight shape of each layer, ``[out, in]`` or ``[out, in, *kernel]``.
        density: global density, in (0, 1].

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science" (Nature Communications 9, 2018); Evci et al., "Rigging the Lottery" (arXiv:1911.11134), section 3.
    """
    return _spread(shapes, density, {name: _sum_over_product(shape[:2]) for name, shape in shapes.items()})


def erk(shapes: Shapes, density: float, *, power_scale: float = 1.0) -> dict[str, float]:
    """Returns Erdos-Renyi-Kernel densities: a layer's is proportional to the sum of its dimensions over their product.

    A layer whose density would pass 1 is dense, and the others take up the difference, so that the active weights over all
    layers are ``density`` of the total.

    Args:
        shapes: weight shape of each layer, ``[out, in]`` or ``[out, in, *kernel]``.
        density: global density, in (0, 1].
        power_scale: exponent of the ratio, above 0; near 0 all layers get the same density, above 1 they differ more.

    Source: Evci et al., "Rigging the Lottery" (arXiv:1911.11134), section 3, and its code for the exponent; used by the SViTE
    paper.
    """
    if not power_scale > 0.0:
        raise ValueError(f"power_scale ({power_scale}) must be above 0")
    return _spread(shapes, density, {name: _sum_over_product(shape) for name, shape in shapes.items()}, power_scale)


DISTRIBUTIONS: dict[str, Callable[..., dict[str, float]]] = {"uniform": uniform, "er": er, "erk": erk}


def counts(shapes: Shapes, densities: Mapping[str, float], unit: str = "weights") -> dict[str, int]:
    """Returns exact numbers of active weights, or blocks, whose sum is the rounded global budget.

    A layer's exact number is density times elements. Each layer gets the floor of it. The weights that remain are given one by
    one to the largest remainders (ties to the earlier layer), so no layer differs from its exact number by a whole weight. A
    layer whose exact number is below 1 still gets one weight. These extra weights are taken from the largest layers of density
    below 1, and from dense layers only if all others have one weight each.

    Args:
        shapes: of each layer's weight, or of its grid of blocks.
        densities: density of each layer, in (0, 1].
        unit: what is counted, for the error.

    Raises:
        ValueError: the budget is below one weight per layer.
    """
    exact = {name: densities[name] * math.prod(shape) for name, shape in shapes.items()}
    budget = round(math.fsum(exact.values()))
    if budget < len(exact):
        raise ValueError(f"leaves {budget} active {unit} for {len(exact)} layers, of which each needs one")
    result = {name: max(1, math.floor(value)) for name, value in exact.items()}
    missing = budget - sum(result.values())
    by_remainder = sorted(exact, key=lambda name: result[name] - exact[name])
    for name in by_remainder[: max(missing, 0)]:
        result[name] += 1
    for _ in range(-missing):
        spare = [name for name, count in result.items() if count > 1]
        sparse = [name for name in spare if densities[name] < 1.0]
        result[max(sparse or spare, key=result.__getitem__)] -= 1
    return result


def _spread(shapes: Shapes, density: float, ratio: Mapping[str, float], power: float = 1.0) -> dict[str, float]:
    """Returns densities min(1, scale * ratio ** power), with the scale at which the active weights meet the global density."""
    _check(shapes, density)
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    result = dict.fromkeys(shapes, 1.0)
    sparse, budget = list(shapes), density * sum(numel.values())
    while sparse:
        # In units of the largest, so that no power is too small for a float.
        largest = max(ratio[name] for name in sparse)
        weight = {name: (ratio[name] / largest) ** power for name in sparse}
        scale = budget / sum(weight[name] * numel[name] for name in sparse)
        over = [name for name in sparse if scale * weight[name] > 1.0]
        if not over:
            return result | {name: scale * weight[name] for name in sparse}
        # Each layer held at 1 raises the others' scale, so all that are over stay over.
        budget -= sum(numel[name] for name in over)
        sparse = [name for name in sparse if name not in over]
    return result


def _sum_over_product(dimensions: Sequence[int]) -> float:
    return sum(dimensions) / math.prod(dimensions)


def _check(shapes: Shapes, density: float) -> None:
    if not shapes:
        raise ValueError("no layer to distribute a density over")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density ({density}) must be in (0, 1]")
