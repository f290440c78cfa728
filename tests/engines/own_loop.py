"""A training loop over a tiny packed model with any optimizer, and what its state becomes at an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import svite_scale
from svite_scale.sparsity import bits
from svite_scale.sparsity.options import TopologyOptions

UPDATE_EVERY = 8
"""Lookahead makes its slow weights at its sixth step."""

EXPECTED = {
    "0": {"exp_avg", "exp_avg_diff", "neg_pre_grad", "last_grad", "momentum_buffer", "momentum", "s", "prev", "grad_avg"}
    | {"lookahead_slow_buff", "ax", "x0", "z", "old_p"},
    "mean": {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_var", "max_exp_avg_var", "sum", "square_avg", "acc_delta"}
    | {"variance", "grad_sum_sq", "step_size"},
}
"""What a grown weight, which is 0, starts with. Averages of gradients begin anew. An average of squares of 0 would make its
first steps too large, so it takes its layer's mean. A copy of a weight is 0 as it is."""

TORCH = {
    f"torch.{name}": made
    for name, made in vars(torch.optim).items()
    if isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and made is not torch.optim.Optimizer
}

Build = Callable[[list[nn.Parameter]], Any]


def by_name(name: str, **options: Any) -> Build:
    if name in TORCH:
        return lambda parameters: TORCH[name](parameters, lr=1e-3, **options)  # type: ignore[call-arg]
    return lambda parameters: create_optimizer_v2(parameters, opt=name, lr=1e-3, **options)


class Loop:
    """A training loop over a tiny model of two packed layers."""

    def __init__(self, build: Build, options: TopologyOptions | None = None, update_every: int = UPDATE_EVERY) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
        svite_scale.sparsify(self.model, density=0.4)
        self.values: nn.Parameter = self.model[0].values  # type: ignore[assignment]
        self.optimizer = build([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        self.topology = svite_scale.attach(
            self.model, self.optimizer, total_steps=100, update_every=update_every, options=options
        )

    def step(self, number: int) -> None:
        """One optimizer step, without the topology's."""
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(number))
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(x), torch.arange(16) % 4).backward()
        for optimizer in self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]:
            optimizer.step()

    def to_update(self) -> None:
        """Up to the optimizer step before an update."""
        for number in range(1, self.topology.schedule.update_every):
            self.step(number)
            assert self.topology.step() is None
        self.step(0)

    def active(self) -> list[int]:
        """Positions of the first layer's values."""
        layer: Any = self.model[0]
        return bits.unpack(layer.mask, 9 * 12).nonzero().flatten().tolist()


def check_followed(loop: Loop, held: dict[str, Tensor], grown: dict[str, str] | None = None) -> set[str]:
    """Updates, and checks each tensor of optimizer state by positions in the dense weight; returns the tensors' names."""
    before = {name: dict(zip(loop.active(), tensor.tolist(), strict=True)) for name, tensor in held.items()}
    means = {name: tensor.double().mean().item() for name, tensor in held.items()}
    assert loop.topology.step() is not None
    came = set(loop.active()) - set(next(iter(before.values()), {}))
    assert came or not held
    for name, tensor in held.items():
        start = (grown or {}).get(name) or next(kind for kind, names in EXPECTED.items() if name in names)
        for position, found in zip(loop.active(), tensor.tolist(), strict=True):
            expected = before[name].get(position, means[name] if start == "mean" else 0.0)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-12), (name, position)
    loop.step(1)
    loop.topology.step()
    assert all(parameter.isfinite().all() for parameter in loop.model.parameters())
    return set(held)


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
