"""Packing whole models."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

import svite_scale
from svite_scale.sparsity import bits
from svite_scale.sparsity.allocation.distributions import counts, erk
from svite_scale.sparsity.hashing import hashed_uniform
from svite_scale.sparsity.layers.packed import PackedConv2d, PackedLinear
from svite_scale.sparsity.packing import random_mask, sparsify
from tests.sparsity.deit import UNPRUNED, deit_shapes
from tests.sparsity.packing import packed_layers

# The package's name sparsify is the function's.
sparsify_module = sys.modules[random_mask.__module__]
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
    plan = sparsify(model, 0.3, init="dense")
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


def test_a_random_mask_is_where_the_hashed_numbers_are_largest() -> None:
    numbers = hashed_uniform(7, 0, "blocks.0", 30).tolist()
    largest = sorted(range(30), key=lambda position: -numbers[position])[:11]
    assert random_mask(30, 11, 7, "blocks.0").nonzero().flatten().tolist() == sorted(largest)
    assert random_mask(30, 30, 7, "blocks.0").all()


def test_equal_numbers_give_the_lower_positions() -> None:
    with patch.object(sparsify_module, "hashed_uniform", lambda *_: torch.tensor([0.5, 0.2, 0.5, 0.5, 0.9])):
        assert random_mask(5, 3, 0, "layer").tolist() == [True, False, True, False, True]


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


def test_a_module_in_several_places_is_one_layer_in_all_of_them() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6).double()
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared))
    (entry,) = sparsify(model, 0.5)
    assert entry.name == "0"
    assert model[0] is model[2] is model[3][0]
    weight = model[0].dense_weight().requires_grad_()
    x = torch.randn(5, 6, dtype=torch.float64)
    layer = lambda y: nn.functional.linear(y, weight, shared.bias)  # noqa: E731
    expected = layer(layer(layer(x).tanh())).square().sum()
    model(x).square().sum().backward()
    (gradient,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(model[0].values.grad, gradient[bits.unpack(model[0].mask, 36).view(6, 6)])


def test_densities_by_pattern_and_layers_kept_dense() -> None:
    model = built("vit_tiny")
    plan = svite_scale.sparsify(model, densities={"*.qkv": 0.1, "blocks.*": 0.3, "*": 0.5}, keep_dense=["head"])
    found = {entry.name: (round(entry.density, 2), entry.kept_dense) for entry in plan}
    for block in ("blocks.0", "blocks.1"):
        assert [found[f"{block}.{kind}"][0] for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")] == [0.1, 0.3, 0.3, 0.3]
    assert (found["patch_embed.proj"], found["head"]) == ((0.5, False), (1.0, True))
    assert type(model.head) is nn.Linear
    assert packed_layers(model).keys() == {entry.name for entry in plan} - {"head"}


def test_raised_layers_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(40, 40), nn.Linear(3, 2))

    with caplog.at_level(logging.WARNING, logger="svite_scale"):
        plan = sparsify(model(), 0.1, distribution="uniform")
        assert [entry.raised for entry in plan] == [True, False, True]
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("svite_scale", "WARNING")
        assert record.getMessage() == "layers whose part of the density is below one weight or block keep one each (2): 0, 2"
        caplog.clear()
        sparsify(model(), 0.5, distribution="uniform")
        assert not caplog.records
