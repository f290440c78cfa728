"""Which parameters weight decay applies to."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import svite_scale
from tests.ranks import run_on_ranks

SMALL = {"num_classes": 10, "img_size": 8, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small_vit() -> nn.Module:
    """A ViT whose head stays dense, so that both kinds of matrix are in it."""
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    svite_scale.sparsify(model, density=0.6, keep_dense=["head"])
    return model


def decay_by_name(model: nn.Module) -> dict[str, float]:
    """The weight decay of each parameter that is in a group; each is in one at most."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], group["weight_decay"])
        for group in svite_scale.parameter_groups(model, 0.05)
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_packed_values_and_matrices_decay_and_nothing_else() -> None:
    model = small_vit()
    decay = decay_by_name(model)
    packed = {name.removesuffix(".mask") for name, _ in model.named_parameters() if name.endswith(".mask")}
    assert len(packed) == 9
    assert {name for name, value in decay.items() if value == 0.05} == {*(f"{name}.values" for name in packed), "head.weight"}
    assert decay["pos_embed"] == decay["cls_token"] == decay["blocks.1.norm2.weight"] == decay["head.bias"] == 0.0
    assert set(decay.values()) == {0.05, 0.0}
    assert {name for name, _ in model.named_parameters()} == set(decay) | {f"{name}.mask" for name in packed}


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    assert decay_by_name(model) == {"0.weight": 0.05, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert [group["weight_decay"] for group in svite_scale.parameter_groups(nn.LayerNorm(4), 0.05)] == [0.0]


def wrapped_decays(kind: str) -> dict[str, float]:
    """The same of a wrapped model, without what the wrapper adds to names."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = small_vit()
    wrap = {"ddp": DistributedDataParallel, "fsdp2": fully_shard, "compiled": torch.compile}[kind]
    wrapped = wrap(model)
    return {name.removeprefix("module.").removeprefix("_orig_mod."): decay for name, decay in decay_by_name(wrapped).items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "compiled"])
def test_a_wrapped_model_decays_like_a_plain_one(kind: str) -> None:
    """What the model itself exempts is named without the wrapper's prefix."""
    plain = decay_by_name(small_vit())
    for found in run_on_ranks(2, wrapped_decays, kind):
        assert found == plain
