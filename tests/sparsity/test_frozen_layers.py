"""Layers that are frozen and thawed."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.topology.engine import TopologyEngine
from tests.ranks import run_on_ranks

UPDATE_EVERY, WINDOW, STEPS = 4, 2, 12
"""So windows are steps 3 and 4, 7 and 8, 11 and 12."""


def packed(block: tuple[int, int] = (1, 1)) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    svite_scale.sparsify(model, 0.37, distribution="uniform", block=block)
    return model


def freeze(model: nn.Sequential, *, thaw: bool = False) -> None:
    """Its middle layer."""
    model[2].values.requires_grad_(thaw)
    model[2].bias.requires_grad_(thaw)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, window: int = WINDOW) -> TopologyEngine:
    options = svite_scale.TopologyOptions(grow_window=window, grown_warmup_steps=2)
    return svite_scale.attach(model, optimizer, total_steps=100, update_every=UPDATE_EVERY, options=options)


def batch(step: int) -> Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(step))


def updates_of_the_middle(
    frozen: set[int], kind: str = "single", block: tuple[int, int] = (1, 1), *, late: bool = False
) -> list[int]:
    """Trains with the middle layer frozen in some steps; those after which it moved. A collective.

    Args:
        frozen: steps.
        kind: of engine.
        block: of its weights.
        late: freeze and thaw between backward and the topology's step.
    """
    model = packed(block)
    # The optimizer is given the layer, though it may be frozen then.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=1e-2)
    wrapped: nn.Module = model
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for module in (model[2], model):
            fully_shard(module)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=1e-2)
    elif kind.startswith("zero"):
        from tests.engines.test_library_use import deepspeed_engine

        wrapped = deepspeed_engine(model, int(kind[-1]))
    if 0 in frozen:
        freeze(model)
    topology = attach(wrapped, None if kind.startswith("zero") else optimizer)
    moved = []
    for step in range(1, STEPS + 1):
        if not late:
            freeze(model, thaw=step not in frozen)
        loss = nn.functional.cross_entropy(wrapped(batch(step)), torch.arange(4))
        if kind.startswith("zero"):
            wrapped.backward(loss)  # type: ignore[operator]
            wrapped.step()  # type: ignore[operator]
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if late:
            freeze(model, thaw=step not in frozen)
        mask = topology.access.read(model[2].mask).clone()
        update = topology.step()
        assert (update is not None) == (step % UPDATE_EVERY == 0), "nobody waits for the frozen layer"
        if update:
            has_moved = not torch.equal(topology.access.read(model[2].mask), mask)
            assert has_moved == (update.layers["2"].dropped > 0)
            assert min(update.layers[name].dropped for name in ("0", "4")) > 0
            assert update.layers["2"].ever_active >= 148 / math.prod(block), "its 148 active weights count too"
            moved += [step] if has_moved else []
    return moved


@pytest.mark.parametrize(
    ("frozen", "moved"),
    [
        (set(), [4, 8, 12]),
        (set(range(STEPS + 1)), []),
        (set(range(3)), [4, 8, 12]),
        (set(range(4)), [8, 12]),
        (set(range(8, STEPS + 1)), [4]),
        (set(range(5, 7)), [4, 8, 12]),
        ({7}, [4, 12]),
        ({8, 9, 10}, [4, 12]),
    ],
)
def test_a_layer_moves_when_it_was_not_frozen_in_its_whole_window(frozen: set[int], moved: list[int]) -> None:
    assert updates_of_the_middle(frozen) == moved


def test_freezing_between_backward_and_step_counts_for_the_backwards_that_follow() -> None:
    # Frozen after the backward of step 6, thawed after that of step 8: steps 7 and 8 had no gradient.
    assert updates_of_the_middle({6, 7}, late=True) == [4, 12]


def frozen_on_engines() -> list[list[int]]:
    engines = {"fsdp2": (4, 1), "zero2": (1, 1), "zero3": (4, 1)}
    return [updates_of_the_middle({0, 1, 2, 3, 9}, kind, block) for kind, block in engines.items()]


def stepped_by_engines() -> list[list[bool]]:
    """Whether ZeRO steps the first layer, and the middle one, which was frozen when it wrapped the model."""
    from tests.engines.test_library_use import deepspeed_engine

    found = []
    for stage in (2, 3):
        model = packed()
        freeze(model)
        access = attach(deepspeed_engine(model, stage)).access
        freeze(model, thaw=True)
        found.append([access.steps(model[index].values) for index in (0, 2)])
    return found


def test_zero_access_knows_the_parameters_it_steps() -> None:
    for found in run_on_ranks(2, stepped_by_engines):
        assert found == [[True, False]] * 2


def test_every_engine_lets_a_layer_be_frozen_and_thawed() -> None:
    for found in run_on_ranks(2, frozen_on_engines):
        assert found == [[8, 12]] * 3


def test_all_layers_may_be_frozen() -> None:
    model = packed()
    for layer in sparse_layers(model).values():
        layer.values.requires_grad_(False)  # type: ignore[operator, union-attr]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    topology = attach(model, optimizer)
    for step in range(1, 5):
        model(batch(step)).sum().backward()
        update = topology.step()
    assert update is not None
    assert [layer.dropped for layer in update.layers.values()] == [0, 0, 0]


def test_a_thawed_layer_that_the_optimizer_doesnt_step_is_named() -> None:
    model = packed()
    freeze(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    topology = attach(model, optimizer)
    freeze(model, thaw=True)

    def steps() -> None:
        for step in range(4):
            model(batch(step)).sum().backward()
            optimizer.step()
            topology.step()

    with pytest.raises(TopologyError, match=r"the optimizer doesn't step 2\.values; .*add_param_group\(\) when thawing"):
        steps()
    model = packed()
    freeze(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    topology = attach(model, optimizer)
    freeze(model, thaw=True)
    optimizer.add_param_group({"params": [model[2].values, model[2].bias]})
    steps()
    assert topology.last_update == 4


@pytest.mark.parametrize("resumed", [False, True])
def test_a_checkpoint_within_a_window_knows_what_was_frozen(resumed: bool) -> None:
    model = packed()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=0.0)
    topology = attach(model, optimizer)
    for step in range(1, 5):
        freeze(model, thaw=step != 3)
        model(batch(step)).square().sum().backward()
        if step == 4:
            break
        topology.step()
    if resumed:
        state = copy.deepcopy(topology.state_dict())
        topology.detach()
        topology = attach(model, optimizer)
        topology.load_state_dict(state)
        assert topology.counters() == state["counters"]
        model(batch(4)).square().sum().backward()
    update = topology.step()
    assert update is not None
    assert [layer.dropped > 0 for layer in update.layers.values()] == [True, False, True]


def thawed_under_ddp(*, anew: bool) -> str | None:
    """What the topology engine says where DDP wrapped a frozen layer, which was thawed. A collective."""
    model = packed()
    freeze(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=1e-2)
    topology = attach(wrapped, optimizer)
    freeze(model, thaw=True)
    if anew:
        wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(1, UPDATE_EVERY + 1):
        nn.functional.cross_entropy(wrapped(batch(2 * step + dist.get_rank())), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        try:
            update = topology.step()
        except TopologyError as error:
            return str(error)
    assert update is not None
    assert update.layers["2"].dropped
    return None


def test_a_layer_that_ddp_doesnt_average_is_named_and_wrapping_again_helps() -> None:
    for message in run_on_ranks(2, partial(thawed_under_ddp, anew=False)):
        assert message.startswith("2.values: it differs between ranks")
    assert run_on_ranks(2, partial(thawed_under_ddp, anew=True)) == [None, None]
