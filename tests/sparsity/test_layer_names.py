"""Whose layers are called what, which engine has them, and what copies of them do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.models.packed_attention import PackedAttention
from svite_scale.models.packed_mlp import PackedMlp
from svite_scale.sparsity.layers.base import SparseLayer, sparse_layers
from svite_scale.sparsity.topology.engine import TopologyEngine
from tests.ranks import run_on_ranks


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6))


class Towers(nn.Module):
    """Two models trained as one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = tower(), tower()

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(x).T


def pack(model: nn.Module) -> None:
    svite_scale.sparsify(model, 0.5, distribution="uniform")


def towers() -> Towers:
    model = Towers()
    pack(model.image)
    pack(model.text)
    return model


def attach(model: nn.Module, update_every: int = 2, **options: int) -> tuple[TopologyEngine, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    chosen = svite_scale.TopologyOptions(**options)  # type: ignore[arg-type]
    topology = svite_scale.attach(model, optimizer, total_steps=100, update_every=update_every, options=chosen)
    return topology, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *topologies: TopologyEngine, steps: int = 2) -> None:
    for step in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for topology in topologies:
            topology.step()


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, layer in sparse_layers(model).items() if not torch.equal(layer.mask, before[name])]


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.mask.detach().clone() for name, layer in sparse_layers(model).items()}


ALL = ["image.0", "image.2", "text.0", "text.2"]


def test_submodels_made_sparse_one_by_one_all_move() -> None:
    model = towers()
    before = masks(model)
    topology, optimizer = attach(model)
    assert list(topology.layers) == ALL
    assert topology.state_dict()["history"].keys() == set(ALL)
    train(model, optimizer, topology)
    assert moved(model, before) == ALL


def test_one_submodel_may_move_alone_and_each_may_have_an_engine() -> None:
    model = towers()
    before = masks(model)
    image, _ = attach(model.image)
    assert list(image.layers) == ["0", "2"]
    train(model, torch.optim.AdamW(model.parameters()), image)
    assert moved(model, before) == ALL[:2]
    before = masks(model)
    text, _ = attach(model.text)
    train(model, torch.optim.AdamW(model.parameters()), image, text)
    assert moved(model, before) == ALL


def test_a_layer_has_one_engine_until_it_is_detached() -> None:
    model = towers()
    image, _ = attach(model.image, update_every=1, grown_warmup_steps=1)
    for overlapping in (model, model.image, model.image[0]):
        with pytest.raises(TopologyError, match="has a topology engine already, and can't have two; call detach"):
            attach(overlapping)
    image.detach()
    with pytest.raises(TopologyError, match="this topology engine was detached; attach another one"):
        image.step()
    assert all(layer.gradient_hook is None for layer in sparse_layers(model).values()), "nobody hears"
    whole, optimizer = attach(model, update_every=1)
    train(model, optimizer, whole, steps=1)
    del whole
    assert all(layer.gradient_hook is None for layer in sparse_layers(model).values()), "an engine that is gone neither"
    attach(model)


def test_layers_made_sparse_as_a_whole_are_drawn_and_called_as_in_the_model() -> None:
    model = Towers()
    pack(model)
    names = {layer.name for layer in sparse_layers(model).values()}
    assert names == set(ALL)
    attach(model)
    assert {layer.name for layer in sparse_layers(model).values()} == names


def test_two_layers_that_share_their_values_are_refused() -> None:
    model = towers()
    model.text[0].values = model.image[0].values
    with pytest.raises(TopologyError, match=r"image\.0 and text\.0 share values"):
        attach(model)


class Module(nn.Module):
    """Calls what it holds as engines do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def wrapped_names() -> list[list[str]]:
    """Names of layers under wrappers: DDP, a compiled model, checkpointed layers, all of them, a user's own, and ZeRO."""
    from tests.engines.test_library_use import deepspeed_engine

    def packed() -> Towers:
        return towers()

    checkpointed = packed()
    checkpointed.image = checkpoint_wrapper(checkpointed.image)
    checkpointed.text[0] = checkpoint_wrapper(checkpointed.text[0])
    models: list[nn.Module] = [
        DistributedDataParallel(packed()),
        torch.compile(packed()),  # type: ignore[list-item]
        checkpointed,
        DistributedDataParallel(torch.compile(checkpointed)),  # type: ignore[arg-type]
        Module(packed()),
        deepspeed_engine(packed(), 2),
    ]
    return [list(sparse_layers(model)) for model in models]


def test_layer_names_leave_out_what_engines_add() -> None:
    (found,) = run_on_ranks(1, wrapped_names)
    own = [f"module.{name}" for name in ALL]
    assert found == [ALL, ALL, ALL, ALL, own, ALL]


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Units(nn.Module):
    """A layer of heads, one of neurons, and one of weights."""

    def __init__(self) -> None:
        super().__init__()
        half = torch.tensor([True, False, True, False])
        self.attn = PackedAttention(Attention(8, num_heads=4), half, "attn.heads", seed=0, grow="candidate")
        self.mlp = PackedMlp(Mlp(8, hidden_features=4), half, "mlp.neurons", seed=0, grow="candidate")
        self.head = nn.Sequential(nn.Linear(8, 6))
        pack(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.attn(x.unsqueeze(1)))).squeeze(1)


def copies_in_a_window() -> None:
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {"deepcopy": copy.deepcopy, "torch.save": pickled}
    torch.manual_seed(0)
    model = Units()
    topology, optimizer = attach(model, update_every=4, grow_window=3)
    assert topology.growth.group is dist.group.WORLD
    train(model, optimizer, topology)
    x = torch.randn(6, 8)
    for how, make in ways.items():
        made = make(model)
        assert torch.equal(made(x), model(x)), how
        recorded = {name: total.clone() for name, total in topology.growth.sums.items()}
        made(x).square().mean().backward()
        assert all(torch.equal(total, recorded[name]) for name, total in topology.growth.sums.items()), "it isn't recorded"
        assert not topology.growth._this_step
        before = masks(made)
        own, own_optimizer = attach(made, update_every=1)
        assert list(own.layers) == list(topology.layers) == ["attn.heads", "mlp.neurons", "head.0"]
        train(made, own_optimizer, own, steps=1)
        assert moved(made, before), f"{how}: the copy has an engine of its own"
    before = masks(model)
    train(model, optimizer, topology)
    assert topology.last_update == 4
    assert "head.0" in moved(model, before), "the model still has its"


def test_a_model_may_be_copied_and_saved_whole_within_a_window() -> None:
    run_on_ranks(2, copies_in_a_window)


def test_sparse_layers_of_one_name_are_refused() -> None:
    class Odd(SparseLayer):
        unit = "weights"

        def name_at(self, path: str) -> str:
            return "odd"

    with pytest.raises(TopologyError, match="two sparse layers of Sequential are called odd; rename a submodule"):
        sparse_layers(nn.Sequential(Odd(), Odd()))
