"""The state of every optimizer of torch and timm follows the weights, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.options import TopologyOptions
from tests.engines.own_loop import TORCH, UPDATE_EVERY, Loop, by_name, check_followed, tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of optimizers that are deprecated, or meant for other parameters

REFUSED = {
    "adahessian": "Adahessian differentiates gradients again within its step",
    "kron": "'Q', a list, can't follow",
    "kronw": "'Q', a list, can't follow",
    "kronc": "'Q', a list, can't follow",
    "torch.LBFGS": "LBFGS keeps a history of all weights as one vector",
}
NOT_ON_PACKED = {"torch.Muon", "torch.SparseAdam"}
"""They say so themselves: no parameters of one dimension, no dense gradients."""

TIMM = [name for name in list_optimizers() if not name.startswith(("bnb", "fused"))]
"""bitsandbytes' and Apex's need a GPU."""


@pytest.mark.parametrize("name", [*TIMM, *TORCH])
def test_the_state_of_every_optimizer_follows_or_is_refused(name: str) -> None:
    if name in NOT_ON_PACKED:
        return
    if name in REFUSED:
        # Kron compiles its step, which takes longer than all of this.
        with torch.compiler.set_stance("force_eager"), pytest.raises(TopologyError, match=REFUSED[name]):
            Loop(by_name(name)).to_update()
        return
    loop = Loop(by_name(name))
    loop.to_update()
    found = check_followed(loop, tensors(loop.optimizer.state[loop.values]))
    assert found or name == "torch.SGD"


VARIANTS = {
    "adamw": {"amsgrad": True},
    "adabelief": {"amsgrad": True},
    "rmsprop": {"centered": True},
    "adafactorbv": {"momentum": 0.9},
    "torch.SGD": {"momentum": 0.9},
    "torch.Adam": {"amsgrad": True},
    "torch.RMSprop": {"centered": True, "momentum": 0.9},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_state_that_an_option_adds_follows(name: str) -> None:
    loop = Loop(by_name(name, **VARIANTS[name]))
    loop.to_update()
    assert check_followed(loop, tensors(loop.optimizer.state[loop.values]))


class Odd(torch.optim.SGD):
    """SGD with state in a place or of a kind that nobody could know."""

    def __init__(self, parameters: list[nn.Parameter], kind: str) -> None:
        super().__init__(parameters, lr=1e-3)
        self.kind = kind
        if kind == "list of copies":
            self.slow = [[parameter.detach().clone() for parameter in parameters]]
        if kind == "one vector":
            self.flat = torch.zeros(sum(parameter.numel() for parameter in parameters))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            if self.kind == "unknown":
                self.state[parameter]["anchor"] = torch.zeros_like(parameter)
            if self.kind == "8 bits":
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.uint8)
            if self.kind == "by number":
                self.state[id(parameter)]["exp_avg"] = torch.zeros_like(parameter)  # type: ignore[index]
            if self.kind == "late":
                self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
                if self.state[parameter]["step"] == 3:
                    self.state[parameter]["anchor"] = torch.zeros_like(parameter)
        if self.kind == "of the first":
            first = self.param_groups[0]["params"][1]
            self.state[first]["d"] = torch.zeros(1000)


ODD = {
    "unknown": (
        1,
        r"0\.values: optimizer state 'anchor' is unknown, .* TopologyOptions\(optimizer_state={'anchor': 'grad.*'}\)",
    ),
    "late": (UPDATE_EVERY, r"0\.values: optimizer state 'anchor' is unknown"),
    "8 bits": (1, r"0\.values: optimizer state 'exp_avg' of torch\.uint8 can't follow moving weights; use an optimizer with"),
    "by number": (1, r"0\.values: Odd\.state\[\.\.\.\]\[exp_avg\] seems to hold an entry per weight, but isn't in"),
    "list of copies": (0, r"0\.values: Odd\.slow\[0\]\[0\] seems to hold an entry per weight"),
    "one vector": (UPDATE_EVERY, r"0\.values: Odd\.flat seems to hold an entry per weight"),
    "of the first": (UPDATE_EVERY, r"0\.values: Odd keeps state of other parameters of the group, but none of this"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_state_is_refused_as_soon_as_it_is_there_and_before_anything_moves(kind: str) -> None:
    after, message = ODD[kind]
    if not after:
        with pytest.raises(TopologyError, match=message):
            Loop(lambda parameters: Odd(parameters, kind))
        return
    loop = Loop(lambda parameters: Odd(parameters, kind))
    for step in range(1, after):
        loop.step(step)
        loop.topology.step()
    loop.step(after)
    active, values = loop.active(), loop.values.clone()
    with pytest.raises(TopologyError, match=message):
        loop.topology.step()
    assert loop.active() == active
    assert torch.equal(loop.values, values)


@pytest.mark.parametrize(("kind", "start"), [("gradient", "0"), ("magnitude", "mean"), ("weight", "0"), ("step_size", "mean")])
def test_the_remedy_for_unknown_state_works(kind: str, start: str) -> None:
    loop = Loop(lambda parameters: Odd(parameters, "unknown"), TopologyOptions(optimizer_state={"anchor": kind}))
    loop.to_update()
    anchor = loop.optimizer.state[loop.values]["anchor"]
    anchor.copy_(torch.arange(1.0, len(anchor) + 1))
    assert check_followed(loop, {"anchor": anchor}, {"anchor": start}) == {"anchor"}


def test_an_unknown_kind_of_state_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_state\\['anchor'\\] = 'moment': is not one of gradient, magnitude"):
        TopologyOptions(optimizer_state={"anchor": "moment"})


@pytest.mark.parametrize("thing", [[], object(), nn.Linear(2, 2)])
def test_an_object_without_an_optimizer_is_refused(thing: Any) -> None:
    with pytest.raises(TopologyError, match=rf"{type(thing).__name__} is no torch optimizer and holds none"):
        Loop(lambda parameters: thing)
