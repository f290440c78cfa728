"""The state of every optimizer of torch and timm follows the weights, or is refused by name; wherever wrappers keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.options import TopologyOptions
from tests.parallel.engines import adamw, build_backend
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # of optimizers that are deprecated, or meant for other parameters

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

REFUSED = {
    "adahessian": "Adahessian needs second derivatives",
    "kron": "'Q', a list, can't follow",
    "kronw": "'Q', a list, can't follow",
    "kronc": "'Q', a list, can't follow",
    "torch.LBFGS": "LBFGS keeps a history of all weights as one vector",
}
NOT_ON_PACKED = {"torch.Muon", "torch.SparseAdam"}
"""They say so themselves: no parameters of one dimension, no dense gradients."""

TORCH = {
    f"torch.{name}": made
    for name, made in vars(torch.optim).items()
    if isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and made is not torch.optim.Optimizer
}
TIMM = [name for name in list_optimizers() if not name.startswith(("bnb", "fused"))]
"""bitsandbytes' and Apex's need a GPU."""

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


@pytest.mark.parametrize("name", [*TIMM, *TORCH])
def test_the_state_of_every_optimizer_follows_or_is_refused(name: str) -> None:
    if name in NOT_ON_PACKED:
        return
    if name in REFUSED:
        with pytest.raises(TopologyError, match=REFUSED[name]):
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


class Sam(torch.optim.Optimizer):
    """As the usual implementations of SAM do, it keeps the weights of its first step, and moments in an optimizer in it."""

    def __init__(self, parameters: list[nn.Parameter], where: str) -> None:
        super().__init__(parameters, {"rho": 0.05})
        inner = torch.optim.AdamW(self.param_groups, lr=1e-3)
        self.inner: Any = {"attribute": inner, "list": [inner], "dict": {"all": inner}, "method": inner.step}[where]
        self.param_groups = inner.param_groups
        for parameter in parameters:
            self.state[parameter]["old_p"] = parameter.detach().clone()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter, state in self.state.items():
            state["old_p"].copy_(parameter.detach())
        self.adamw().step()

    def adamw(self) -> torch.optim.Optimizer:
        inner = self.inner
        if isinstance(inner, torch.optim.Optimizer):
            return inner
        found: torch.optim.Optimizer = inner[0] if isinstance(inner, list) else getattr(inner, "__self__", None) or inner["all"]
        return found


class NoOptimizer:
    """Wraps as Apex's LARC does: it is no torch optimizer itself."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optim = torch.optim.AdamW(parameters, lr=1e-3)
        self.param_groups = self.optim.param_groups

    def step(self) -> None:
        self.optim.step()


def accelerated(parameters: list[nn.Parameter]) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(create_optimizer_v2(parameters, opt="lookahead_adamw", lr=1e-3))


ADAMW = {"exp_avg", "exp_avg_sq"}
WRAPPERS: dict[str, tuple[Build, Callable[[Any], list[torch.optim.Optimizer]], set[str]]] = {
    "lookahead": (by_name("lookahead_adamw"), lambda o: [o._base_optimizer], ADAMW | {"lookahead_slow_buff"}),
    "accelerated": (accelerated, lambda o: [o.optimizer._base_optimizer], ADAMW | {"lookahead_slow_buff"}),
    "no optimizer": (NoOptimizer, lambda o: [o.optim], ADAMW),
    "one for each": (lambda ps: [torch.optim.AdamW([p], lr=1e-3) for p in ps], lambda o: o, ADAMW),
    **{
        f"SAM, {where}": (lambda ps, where=where: Sam(ps, where), lambda o: [o, o.adamw()], ADAMW | {"old_p"})
        for where in ("attribute", "list", "dict", "method")
    },
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_state_follows_wherever_a_wrapper_keeps_it(kind: str) -> None:
    build, holders, expected = WRAPPERS[kind]
    loop = Loop(build)
    loop.to_update()
    held: dict[str, Tensor] = {}
    for holder in holders(loop.optimizer):
        held |= tensors(holder.state.get(loop.values, {}))
    assert check_followed(loop, held) == expected


def test_the_warm_up_of_grown_weights_reaches_the_optimizer_in_a_wrapper() -> None:
    """The first of four steps moves what has grown a quarter as far."""
    loops = [Loop(by_name("lookahead_adamw"), TopologyOptions(grown_warmup_steps=steps)) for steps in (0, 4)]
    moved = []
    for loop in loops:
        loop.to_update()
        loop.topology.step()
        grown = (loop.values == 0).nonzero().flatten()
        assert len(grown) > 3
        loop.step(1)
        moved.append(loop.values[grown].detach())
    torch.testing.assert_close(moved[1], moved[0] / 4, rtol=1e-5, atol=0)


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
    with pytest.raises(ValueError, match="optimizer_state 'anchor' is 'moment'; use one of gradient, magnitude, weight, step"):
        TopologyOptions(optimizer_state={"anchor": "moment"})


@pytest.mark.parametrize("thing", [[], object(), nn.Linear(2, 2)])
def test_what_holds_no_optimizer_is_refused(thing: Any) -> None:
    with pytest.raises(TopologyError, match=rf"{type(thing).__name__} is no torch optimizer and holds none"):
        Loop(lambda parameters: thing)


def two_optimizers_of_one_weight(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, lr=1e-3), torch.optim.Adam(parameters, lr=1e-3)]


def test_two_optimizers_of_one_weight_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"0\.values: two optimizers keep an 'exp_avg' of it"):
        Loop(two_optimizers_of_one_weight).to_update()


class Layers(nn.Sequential):
    """Two packed layers whose counts of weights are odd, for engines that cut them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(9, 11), nn.GELU(), nn.Linear(11, 5))
        svite_scale.sparsify(self, density=0.37)


def lookahead(model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2([p for p in model.parameters() if p.requires_grad], opt="lookahead_adamw", lr=1e-3)


def slow_weights(model: Layers, wrapped: nn.Module, optimizer: Any) -> list[Tensor]:
    """Lookahead's, in full, after an update and another step. A collective."""
    topology = svite_scale.attach(wrapped, optimizer, total_steps=100, update_every=UPDATE_EVERY)
    for number in range(1, UPDATE_EVERY + 2):
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(number))
        model.zero_grad()
        nn.functional.cross_entropy(wrapped(x), torch.arange(16) % 5).backward()
        optimizer.step()
        assert (topology.step() is not None) == (number == UPDATE_EVERY)
    found = []
    for layer in topology.layers.values():
        slow = optimizer._base_optimizer.state[layer.values]["lookahead_slow_buff"]
        found.append(slow.full_tensor() if isinstance(slow, DTensor) else slow)
    return found


def check_on_ranks() -> None:
    model = Layers()
    expected = slow_weights(model, model, lookahead(model))
    for kind in ("ddp", "fsdp2"):
        sharded: Any = Layers()
        wrapped = nn.parallel.DistributedDataParallel(sharded) if kind == "ddp" else fully_shard(sharded)
        for found, wanted in zip(slow_weights(sharded, wrapped, lookahead(sharded)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
            assert found.count_nonzero() < found.numel(), "some have grown"
    redundant = ZeroRedundancyOptimizer([p for p in model.parameters() if p.requires_grad], torch.optim.AdamW, lr=1e-3)
    with pytest.raises(
        TopologyError, match=r"ZeroRedundancyOptimizer hands only some .* FSDP2's fully_shard or DeepSpeed ZeRO st"
    ):
        svite_scale.attach(model, redundant, total_steps=100, update_every=5)
    check_zero(1)
    check_zero(3)


def check_zero(stage: int) -> None:
    with pytest.raises(TopologyError, match="finds no state of AdamW within Lookahead; initialize DeepSpeed with AdamW alone"):
        build_backend(f"zero{stage}", Layers(), lookahead)
    backend: Any = build_backend(f"zero{stage}", Layers(), adamw)
    with pytest.raises(TopologyError, match=r"belongs to a DeepSpeed engine; attach to that: attach\(engine, "):
        svite_scale.attach(backend.model, backend.wrapped.optimizer, total_steps=100, update_every=5)


def test_on_ranks_lookahead_follows_or_is_refused() -> None:
    """Under DDP and FSDP2 it trains as on one process; torch's own sharded optimizer and DeepSpeed around it are refused."""
    run_on_ranks(2, check_on_ranks)
