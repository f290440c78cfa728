"""The state of optimizers follows the weights wherever a wrapper keeps it, or the wrapper is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.options import TopologyOptions
from tests.engines.engines import adamw, build_backend, units_vit
from tests.engines.own_loop import UPDATE_EVERY, Build, Loop, by_name, check_followed, tensors
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # of optimizers that are deprecated, or meant for other parameters


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


def test_slow_weights_of_a_grown_unit_start_at_its_initial_rows() -> None:
    model = units_vit()
    optimizer: Any = lookahead(model)
    topology = svite_scale.attach(model, optimizer, total_steps=100, update_every=UPDATE_EVERY, unit_drop_fraction=0.5)
    before: dict[str, Tensor] = {}
    for number in range(UPDATE_EVERY):
        inputs = torch.randn(8, 1, 14, 14, generator=torch.Generator().manual_seed(number))
        nn.functional.cross_entropy(model(inputs), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: bits.unpack(layer.mask, layer.shape.numel()) for name, layer in topology.layers.items()}
        topology.step()
    born = 0
    for name, layer in topology.layers.items():
        active = bits.unpack(layer.mask, layer.shape.numel())
        grown = ~before[name][active]
        for moving in layer.unit_parameters().values():
            slow = optimizer._base_optimizer.state[moving.parameter]["lookahead_slow_buff"]
            rows, expected = (
                tensor.reshape(moving.repeats, layer.num_active, -1)[:, grown] for tensor in (slow, moving.parameter)
            )
            assert torch.equal(rows, expected), name
            born += int(expected.count_nonzero())
    assert born > 0
