"""A naive dense-masked trainer in float64: what the packed one must equal, written apart from it.

Weights, masks, gradients and moments are dense tensors; every rule is spelled out with sorting and loops. Nothing here
imports svite_scale.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


def prune_and_grow(
    active: Sequence[bool], drop: Sequence[float], grow: Sequence[float], count: int, protected: Collection[int] = ()
) -> list[bool]:
    """The decision by two sorts of (score, index) pairs. Indices in ``protected`` are dropped after all others."""
    everything = range(len(active))
    eligible = (index for index in everything if active[index])
    by_drop = sorted(eligible, key=lambda index: (index in protected, drop[index], index))
    survivors = set(by_drop[count:])
    by_grow = sorted((index for index in everything if index not in survivors), key=lambda index: (-grow[index], index))
    topology = survivors | set(by_grow[:count])
    return [index in topology for index in everything]


def splitmix64(key: int, position: int) -> int:
    """Output ``position`` of the published generator seeded with ``key``, in unbounded integers cut to 64 bits."""
    word = (1 << 64) - 1
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def hashed_uniform(seed: int, step: int, name: str, positions: Sequence[int]) -> list[float]:
    """The first 24 of 64 hashed bits as a number in [0, 1), for each position."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()[:8], "little")
    return [(splitmix64(key, position) >> 40) / 2**24 for position in positions]


def num_units_moved(fraction: float, num_active: int, name: str, step: int, seed: int) -> int:
    """Neurons that an update moves in the layer ``name``, and heads too, of which it moves one at most."""
    (uniform,) = hashed_uniform(seed, step, f"{name}/moved", [0])
    count = math.floor(fraction * num_active + uniform)
    return min(count, 1) if name.endswith("heads") else count


def cosine_rate(initial: float, final: float, step: int, stop_step: int) -> float:
    """Half a cosine from ``initial`` at step 0 to ``final`` at ``stop_step``."""
    return final + (initial - final) * (1 + math.cos(math.pi * step / stop_step)) / 2


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float, power: float = 1.0) -> dict[str, float]:
    """In proportion to (sum of dimensions / product of dimensions) ^ power."""
    ratio = {name: (sum(shape) / math.prod(shape)) ** power for name, shape in shapes.items()}
    return capped_densities(shapes, density, ratio)


def er_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """In proportion to 1 / fan in + 1 / fan out, without the kernel."""
    return capped_densities(shapes, density, {name: 1 / shape[0] + 1 / shape[1] for name, shape in shapes.items()})


def capped_densities(shapes: Mapping[str, Sequence[int]], density: float, ratio: Mapping[str, float]) -> dict[str, float]:
    """min(1, scale * ratio), the scale found by bisection."""
    budget = density * sum(math.prod(shape) for shape in shapes.values())
    low, high = 0.0, 1 / min(ratio.values())
    for _ in range(200):
        scale = (low + high) / 2
        used = sum(min(1.0, scale * ratio[name]) * math.prod(shape) for name, shape in shapes.items())
        low, high = (scale, high) if used < budget else (low, scale)
    return {name: min(1.0, high * ratio[name]) for name in shapes}


def unit_positions(shape: Sequence[int], block: tuple[int, int]) -> list[list[int]]:
    """The flat positions of each block of a weight of ``shape``, taken as a matrix, by the definition of a block: those of a
    column of the block one after another. Blocks along a row come first.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    height, width = block
    return [
        [(row + v) * columns + column + u for u in range(width) for v in range(height)]
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


class MaskedTrainer:
    """AdamW and prune-and-grow on a dense module whose masked weights are multiplied by 0 or 1.

    Attributes:
        weights: by parameter name, float64; masked ones are 0 where inactive.
        units: by parameter name, the flat positions of each unit, one or a block of them, for the masked parameters alone.
        masks: by parameter name, bool like the weight.
        gradients: of the last step, dense, before clipping.
        moments: by parameter name, the first and second moment, dense.
        lr_shares: by parameter name, what each weight's learning rate is multiplied by; 1 where there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        active: Mapping[str, Sequence[bool]],
        blocks: Mapping[str, tuple[int, int]],
        *,
        lr: float,
        weight_decay: float,
        clip: float,
    ) -> None:
        """``active`` and ``blocks`` have, by name of a masked parameter, which of its units are active, and their size."""
        self.model, self.lr, self.weight_decay, self.clip = model, lr, weight_decay, clip
        self.weights = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
        self.units = {name: unit_positions(self.weights[name].shape, block) for name, block in blocks.items()}
        self.masks = {name: self.mask_of(name, units) for name, units in active.items()}
        for name, mask in self.masks.items():
            self.weights[name] *= mask
        self.moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in self.weights.items()}
        self.gradients: dict[str, Tensor] = {}
        self.lr_shares: dict[str, Tensor] = {}
        self.steps = 0

    def step(self, inputs: Tensor, labels: Tensor) -> float:
        """One optimizer step; returns the loss before it."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        loss = nn.functional.cross_entropy(functional_call(self.model, leaves, (inputs,)), labels)
        self.gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        active = {name: gradient * self.masks.get(name, 1) for name, gradient in self.gradients.items()}
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in active.values()))
        shrink = min(1.0, self.clip / (norm + 1e-6))
        self.steps += 1
        for name, gradient in active.items():
            self._adamw(name, gradient * shrink)
        return float(loss.detach())

    def _adamw(self, name: str, gradient: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        first, second = self.moments[name]
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        self.moments[name] = (first, second)
        corrected_first = first / (1 - beta1**self.steps)
        corrected_second = second / (1 - beta2**self.steps)
        lr = self.lr * self.lr_shares.get(name, torch.ones((), dtype=torch.float64))
        decayed = self.weights[name] * (1 - lr * self.weight_decay)
        self.weights[name] = decayed - lr * corrected_first / (corrected_second.sqrt() + eps)

    def mask_of(self, name: str, active: Sequence[bool]) -> Tensor:
        """The mask of a parameter with these active units."""
        mask = torch.zeros(self.weights[name].numel(), dtype=torch.bool)
        for positions, is_active in zip(self.units[name], active, strict=True):
            mask[positions] = is_active
        return mask.view(self.weights[name].shape)

    def active_units(self, name: str) -> list[bool]:
        mask = self.masks[name].flatten()
        return [bool(mask[positions[0]]) for positions in self.units[name]]

    def norms(self, name: str, dense: Tensor) -> list[float]:
        """The L2 norm of each unit of a tensor like the parameter."""
        elements = dense.flatten().tolist()
        return [math.hypot(*(elements[position] for position in positions)) for positions in self.units[name]]

    def update(
        self,
        name: str,
        count: int,
        grown_moments: str,
        grow: Sequence[float] | None = None,
        protected: Collection[int] = (),
    ) -> tuple[set[int], set[int]]:
        """Prunes and grows one parameter by the norms of the last step's gradient, or by the scores ``grow``, and drops
        ``protected`` units last; returns the units dropped and those grown.
        """
        old = self.active_units(name)
        scores = self.norms(name, self.gradients[name]) if grow is None else grow
        new = prune_and_grow(old, self.norms(name, self.weights[name]), scores, count, protected)
        weight = self.weights[name].flatten().clone()
        first, second = (moment.flatten().clone() for moment in self.moments[name])
        start = float(second[self.masks[name].flatten()].mean()) if grown_moments == "mean" else 0.0
        for positions, was_active, is_active in zip(self.units[name], old, new, strict=True):
            if not is_active:
                weight[positions], first[positions], second[positions] = 0.0, 0.0, 0.0
            elif not was_active:
                weight[positions], first[positions], second[positions] = 0.0, 0.0, start
        shape = self.weights[name].shape
        self.masks[name], self.weights[name] = self.mask_of(name, new), weight.view(shape)
        self.moments[name] = (first.view(shape), second.view(shape))
        dropped = {unit for unit, active in enumerate(old) if active and not new[unit]}
        return dropped, {unit for unit, active in enumerate(new) if active and not old[unit]}
