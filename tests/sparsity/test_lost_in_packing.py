"""What was done to a dense layer and a packed one wouldn't do is refused by name, and the remedy that is named helps."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.packed import PackedLinear
from tests.ranks import run_on_ranks
from tests.sparsity.packing import packed_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
"""torch calls its first weight_norm deprecated."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Linear(8, 8))


def seen(*_: object) -> None: ...


def do_nothing(layer: nn.Linear) -> None: ...


def compiled(layer: nn.Linear) -> None:
    layer.compile()


def other_forward(layer: nn.Linear) -> None:
    layer.forward = layer.forward  # type: ignore[method-assign]


HOOK = "register them after sparsify()"
REPARAMETRIZED = "call remove_weight_norm(), remove_spectral_norm() or prune.remove() of torch.nn.utils first"
PARAMETRIZED = "call torch.nn.utils.parametrize.remove_parametrizations() first"
DONE: dict[str, tuple[Callable[[nn.Linear], object], str, str]] = {
    "forward hook": (lambda layer: layer.register_forward_hook(seen), "has forward hooks", HOOK),
    "forward pre-hook": (lambda layer: layer.register_forward_pre_hook(seen), "has forward pre-hooks", HOOK),
    "with kwargs": (lambda layer: layer.register_forward_hook(seen, with_kwargs=True), "has forward hooks", HOOK),
    "backward hook": (lambda layer: layer.register_full_backward_hook(seen), "has backward hooks", HOOK),
    "backward pre-hook": (lambda layer: layer.register_full_backward_pre_hook(seen), "has backward pre-hooks", HOOK),
    "state": (lambda layer: layer.register_state_dict_post_hook(seen), "has state_dict hooks", HOOK),
    "state before": (lambda layer: layer.register_state_dict_pre_hook(seen), "has state_dict pre-hooks", HOOK),
    "load": (lambda layer: layer.register_load_state_dict_pre_hook(seen), "has load_state_dict pre-hooks", HOOK),
    "loaded": (lambda layer: layer.register_load_state_dict_post_hook(seen), "has load_state_dict post-hooks", HOOK),
    "weight hook": (lambda layer: layer.weight.register_hook(seen), "has hooks on its weight", "register them on the packed"),
    "gradient hook": (
        lambda layer: layer.weight.register_post_accumulate_grad_hook(seen),
        "has hooks on its weight",
        "register them on the packed layer's values after sparsify()",
    ),
    "weight_norm": (nn.utils.weight_norm, "computes its weight or bias from weight_g and weight_v", REPARAMETRIZED),
    "of the bias": (
        lambda layer: nn.utils.weight_norm(layer, "bias"),
        "computes its weight or bias from bias_g",
        REPARAMETRIZED,
    ),
    "spectral_norm": (nn.utils.spectral_norm, "computes its weight or bias from weight_orig", REPARAMETRIZED),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        "computes its weight or bias from weight_orig and weight_mask",
        REPARAMETRIZED,
    ),
    "pruned bias": (
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
        "computes its weight or bias from bias_orig and bias_mask",
        REPARAMETRIZED,
    ),
    "parametrized": (
        parametrizations.weight_norm,
        "is parametrized",
        "call torch.nn.utils.parametrize.remove_parametrizations()",
    ),
    "orthogonal": (parametrizations.orthogonal, "is parametrized", PARAMETRIZED),
    "buffer": (lambda layer: layer.register_buffer("scale", torch.ones(1)), "holds scale too", "let its parent hold that"),
    "parameter": (
        lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(1))),
        "holds gain too",
        "let its parent hold that",
    ),
    "module": (lambda layer: layer.add_module("adapter", nn.Identity()), "holds adapter too", "let its parent hold that"),
    "forward": (other_forward, "has another forward than its class", "set that after sparsify()"),
    "compiled": (compiled, "is compiled by itself", "compile it after sparsify()"),
}


@pytest.mark.parametrize("what", DONE)
def test_what_packing_would_lose_is_refused_by_name_and_may_be_kept_dense(what: str) -> None:
    do, problem, remedy = DONE[what]
    net = model()
    do(net[2])
    before = list(net.children())
    with pytest.raises(TopologyError, match=re.escape(f"2 {problem}") + ".*, which packing would lose; .*keep_dense") as error:
        svite_scale.sparsify(net, 0.5, distribution="uniform")
    assert remedy in str(error.value)
    assert list(net.children()) == before, "a refused model is left as it was"
    svite_scale.sparsify(net, 0.5, distribution="uniform", keep_dense=["2"])
    assert list(packed_layers(net)) == ["0", "1"]
    assert net[2] is before[2]


REMOVED: dict[str, tuple[Callable[[nn.Linear], object], Callable[[nn.Linear], object]]] = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "parametrized": (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "hook": (do_nothing, lambda layer: layer.register_forward_hook(seen).remove()),
}


@pytest.mark.parametrize("what", REMOVED)
def test_a_layer_is_packed_after_the_remedy(what: str) -> None:
    do, undo = REMOVED[what]
    net = model()
    do(net[2])
    undo(net[2])
    weight = net[2].weight.detach().clone()
    svite_scale.sparsify(net, 0.5, distribution="uniform", init="dense")
    assert isinstance(net[2], PackedLinear)
    dense = net[2].dense_weight()
    assert torch.equal(dense, weight * (dense != 0))


def test_attributes_of_a_layer_and_of_its_weight_are_copied() -> None:
    net = model()
    net[2].stage = "late"
    net[2].weight.no_decay = True
    svite_scale.sparsify(net, 0.5, distribution="uniform")
    assert net[2].stage == "late"
    assert net[2].values.no_decay
    assert not hasattr(net[0], "stage")
    net = model()
    net[2].num_active = 3
    with pytest.raises(TopologyError, match="2 has an attribute 'num_active', which a packed layer has for itself; rename it"):
        svite_scale.sparsify(net, 0.5, distribution="uniform")


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(TopologyError, match="1 is lazy and has no shape yet; run the model on a batch before"):
        svite_scale.sparsify(net, 0.5, distribution="uniform")
    net(torch.randn(2, 8))
    svite_scale.sparsify(net, 0.5, distribution="uniform")
    assert list(packed_layers(net)) == ["0", "1"]


def test_checkpointed_and_compiled_layers_are_named_and_drawn_as_if_they_werent() -> None:
    plain, wrapped = model(), model()
    svite_scale.sparsify(plain, densities={"0": 0.5, "*": 0.3})
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    compiled_model = torch.compile(wrapped)
    svite_scale.sparsify(compiled_model, densities={"0": 0.5, "*": 0.3})
    layers = packed_layers(compiled_model)
    assert list(layers) == ["0", "1", "2"]
    for name, layer in packed_layers(plain).items():
        assert torch.equal(layer.mask, layers[name].mask), name


REMEDY = "make the model sparse first, whole on each rank or on the meta device, and wrap it after that"


def refused_after_wrapping() -> list[str]:
    import deepspeed
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def refusal(wrapped: nn.Module) -> str:
        with pytest.raises(TopologyError) as error:
            svite_scale.sparsify(wrapped, density=0.5)
        return str(error.value)

    def sharded(*path: int) -> nn.Module:
        net = model()
        for index in path:
            fully_shard(net[index])
        return net if path else fully_shard(net)

    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}):
        partitioned = model()
    fsdp1 = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    return [refusal(net) for net in (partitioned, sharded(), sharded(1), DistributedDataParallel(model()), fsdp1)]


def test_a_model_that_an_engine_has_wrapped_is_refused() -> None:
    expected = [
        "0.weight, of shape (8, 8), is partitioned already, by deepspeed.zero.Init",
        "0.weight is sharded already, as (Shard(dim=0),)",
        "1.weight is sharded already, as (Shard(dim=0),)",
        "a DistributedDataParallel has wrapped the model already",
        "a FullyShardedDataParallel has wrapped the model already",
    ]
    (refusals,) = run_on_ranks(1, refused_after_wrapping)
    assert refusals == [f"{problem}; {REMEDY}" for problem in expected]
