"""Packing whole models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.distributions import counts, erk
from svite_scale.sparsity.layers import PackedConv2d, PackedLinear, packed_layers
from svite_scale.sparsity.sparsify import LayerPlan, random_mask, sparsify
from tests.sparsity.deit import UNPRUNED, deit_shapes

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", **TINY),
    "deit_distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY),
    "registers, qk norm, layer scale": lambda: VisionTransformer(**TINY, reg_tokens=3, qk_norm=True, init_values=0.1),
    "no biases, average pool": lambda: VisionTransformer(
        **TINY, qkv_bias=False, proj_bias=False, class_token=False, global_pool="avg", fc_norm=True
    ),
    "attention pool": lambda: VisionTransformer(**TINY, global_pool="map", class_token=False),
}


def built(name: str, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_any_vision_transformer_is_packed(name: str) -> None:
    dense = built(name)
    model = copy.deepcopy(dense)
    plan = sparsify(model, 0.3)
    prunable = {name: module for name, module in dense.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    assert [entry.name for entry in plan] == list(prunable)
    expected = counts(shapes := {name: module.weight.shape for name, module in prunable.items()}, erk(shapes, 0.3))
    layers = packed_layers(model)
    for entry in plan:
        assert entry.num_active == expected[entry.name]
        if not entry.is_packed:
            assert type(model.get_submodule(entry.name)) is type(prunable[entry.name])
            continue
        layer, old = layers[entry.name], prunable[entry.name]
        assert model.get_submodule(entry.name) is layer
        assert layer.name == entry.name
        assert isinstance(layer, PackedConv2d if isinstance(old, nn.Conv2d) else PackedLinear)
        active = bits.unpack(layer.mask.detach(), entry.numel).view(entry.shape)
        assert layer.values.numel() == int(active.sum()) == layer.num_active == entry.num_active
        assert torch.equal(layer.dense_weight(), old.weight * active), "active weights keep their initial values"
        assert (layer.bias is None) == (old.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, old.bias)
    assert_forward_is_that_of_the_masked(model, dense)


@torch.no_grad()
def assert_forward_is_that_of_the_masked(model: nn.Module, dense: nn.Module) -> None:
    for name, layer in packed_layers(model).items():
        weight = dense.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(layer.dense_weight())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), dense.eval()(images))
    torch.testing.assert_close(model.train()(images), dense.train()(images))


def test_state_dict_names() -> None:
    dense = built("vit_tiny")
    model = copy.deepcopy(dense)
    packed = {entry.name for entry in sparsify(model, 0.3) if entry.is_packed}
    expected = [
        name
        for key in dense.state_dict()
        for name in ([f"{key[:-7]}.values", f"{key[:-7]}.mask"] if key.endswith(".weight") and key[:-7] in packed else [key])
    ]
    assert sorted(model.state_dict()) == sorted(expected)
    other = built("vit_tiny", seed=1)
    sparsify(other, 0.3, seed=5)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(other.eval()(images), model.eval()(images))


def masks(model: nn.Module) -> dict[str, list[int]]:
    return {name: layer.mask.tolist() for name, layer in packed_layers(model).items()}


def test_masks_come_from_the_seed_and_the_name_alone() -> None:
    models = [built("vit_tiny", seed=seed) for seed in range(4)]
    for model, seed in zip(models, (0, 0, 1, 0), strict=True):
        torch.manual_seed(len(models) + seed)
        sparsify(model, 0.3, seed=seed)
    assert masks(models[0]) == masks(models[1]) == masks(models[3])
    other = masks(models[2])
    assert all(other[name] != mask for name, mask in masks(models[0]).items()), "another seed draws other masks"


def test_layers_of_one_shape_get_different_masks() -> None:
    model = built("vit_tiny")
    sparsify(model, 0.3)
    found = masks(model)
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert found[f"blocks.0.{kind}"] != found[f"blocks.1.{kind}"]


def test_packing_draws_nothing_from_the_global_generator() -> None:
    model = built("vit_tiny")
    before = torch.get_rng_state()
    sparsify(model, 0.3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_mask_has_exactly_its_count_and_no_preference() -> None:
    drawn = torch.stack([random_mask(40, 10, seed, "layer") for seed in range(2000)])
    assert (drawn.sum(dim=1) == 10).all()
    # 5 standard deviations of a binomial with p = 1/4 around its mean of 500.
    assert (drawn.sum(dim=0) - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize(("size", "density"), [("tiny", 0.7), ("small", 0.5), ("base", 0.3)])
def test_deit_on_the_meta_device(size: str, density: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224")
    plan = sparsify(model, density)
    assert {entry.name: tuple(entry.shape) for entry in plan} == deit_shapes(size)
    total = sum(entry.numel for entry in plan)
    assert sum(entry.num_active for entry in plan) == round(density * total)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == UNPRUNED[size] + round(density * total)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_density_1_leaves_the_model_dense() -> None:
    model = built("vit_tiny")
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    plan = sparsify(model, 1.0)
    assert all(entry.num_active == entry.numel and not entry.is_packed for entry in plan)
    assert dict(model.named_modules()) == modules
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_uniform_packs_every_layer_alike() -> None:
    for entry in svite_scale.sparsify(built("vit_tiny"), density=0.25, distribution="uniform"):
        assert abs(entry.num_active - 0.25 * entry.numel) < 1


def test_a_plan_knows_its_sizes() -> None:
    plan = LayerPlan("fc", torch.Size((4, 5)), 8)
    assert (plan.numel, plan.is_packed, plan.num_active / plan.numel) == (20, True, 0.4)
    assert not LayerPlan("fc", torch.Size((4, 5)), 20).is_packed


def test_mode_and_dtype_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval().double()
    sparsify(model, 0.5)
    assert all(not layer.training and layer.values.dtype == torch.float64 for layer in packed_layers(model).values())


class OwnLinear(nn.Linear):
    """Uses its weight as it likes."""


def test_a_subclass_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(6, 6), OwnLinear(6, 6))
    assert [entry.name for entry in sparsify(model, 0.5)] == ["0"]
    assert type(model[1]) is OwnLinear


def tied(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return nn.ModuleDict({"first": first, "second": second})


@pytest.mark.parametrize(
    "model",
    [
        tied(nn.Linear(4, 4), nn.Linear(4, 4)),
        tied(nn.Embedding(4, 4), nn.Linear(4, 4)),
        tied(nn.Linear(4, 4), nn.Embedding(4, 4)),
    ],
)
def test_tied_weights_are_refused(model: nn.Module) -> None:
    with pytest.raises(TopologyError, match="first and second share a parameter; untie them"):
        sparsify(model, 0.5)
    assert not packed_layers(model), "a refused model is left as it was"


def test_a_tied_bias_is_refused() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    with pytest.raises(TopologyError, match="first and second share a parameter"):
        sparsify(nn.ModuleDict({"first": first, "second": second}), 0.5)


def test_a_module_that_stands_twice_in_the_model_is_refused() -> None:
    shared = nn.Linear(4, 4)
    with pytest.raises(TopologyError, match="first and second share a parameter"):
        sparsify(nn.ModuleDict({"first": shared, "second": shared}), 0.5)


def test_weights_tied_among_dense_modules_are_no_matter() -> None:
    first, second = nn.LayerNorm(4), nn.LayerNorm(4)
    second.weight = first.weight
    assert len(sparsify(nn.Sequential(first, second, nn.Linear(4, 4)), 0.5)) == 1


def test_packing_twice_is_refused() -> None:
    model = built("vit_tiny")
    sparsify(model, 0.5)
    with pytest.raises(TopologyError, match="packed already"):
        sparsify(model, 0.5)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(TopologyError, match="LayerNorm has no Linear or Conv2d"):
        sparsify(nn.LayerNorm(3), 0.5)


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'erdos' is unknown; use one of uniform, erk"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), 0.5, distribution="erdos")


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), density)
