"""Which blocks' heads and neurons are made sparse, how many of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer

from svite_scale.config.schema import SparsityConfig
from svite_scale.errors import ConfigError, OptionError, SviteScaleError
from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig, StructuredConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.models.structure import pack_units
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.packing import sparsify
from tests.models.unit_twins import MODEL, TINY, active_units, packed_vit


@pytest.mark.parametrize(("heads", "neurons"), [(0.7, 0.6), (1.0, 0.3), (0.34, 1.0)])
def test_counts_are_those_of_the_papers_code_and_shapes_shrink(heads: float, neurons: float) -> None:
    packed = packed_vit(heads=heads, neurons=neurons)
    for layer in sparse_layers(packed).values():
        assert layer.num_active == (int(6 * heads) if layer.unit == "heads" else int(48 * neurons))
        assert int(active_units(layer).sum()) == layer.num_active
    attn, mlp = packed.blocks[0].attn, packed.blocks[0].mlp  # type: ignore[index,union-attr]
    assert attn.qkv.weight.shape == (3 * int(6 * heads) * 2, 12)  # type: ignore[union-attr]
    assert mlp.fc1.weight.numel() == mlp.fc2.weight.numel() == int(48 * neurons) * 12  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"structured": StructuredConfig(heads=0.1)}, r"^sparsity.structured.heads = 0.1: keeps none of 6 heads; raise it$"),
        (
            {"structured": StructuredConfig(heads=0.7), "keep_dense": ("blocks.*.attention.*",)},
            r"^sparsity.keep_dense = 'blocks.\*.attention.\*': matches no prunable layer",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(sparsity: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sparse(MODEL, SparsityConfig(**sparsity), 0)  # type: ignore[arg-type]


def test_differential_attention_is_refused() -> None:
    model = ModelConfig(name="vit_dwee_patch16_reg1_gap_256", **TINY | {"num_heads": 3})
    with pytest.raises(
        ConfigError, match=r"^sparsity.structured.heads = 0.5: can't pack blocks.0.attn, which is no plain attention.*; leave"
    ):
        build_sparse(model, SparsityConfig(structured=StructuredConfig(heads=0.5)), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0.5, "grow": "candidates"}, r"grow = 'candidates': is not one of candidate, paper; use one of "),
        ({"heads": 1.5}, r"heads = 1.5: is above 1.0; use a number above 0.0 and up to 1.0$"),
        ({"neurons": 0.0}, r"neurons = 0.0: is not above 0.0; use a number above 0.0 and up to 1.0$"),
    ],
)
def test_an_argument_that_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        pack_units(build_dense(MODEL), **options)


def test_a_gated_mlp_is_refused() -> None:
    model = ModelConfig(name="vit_giant_patch14_reg4_dinov2", **TINY)
    with pytest.raises(
        ConfigError, match=r"^sparsity.structured.neurons = 0.5: can't pack blocks.0.mlp, which .*; leave it at 1.0$"
    ):
        build_sparse(model, SparsityConfig(structured=StructuredConfig(neurons=0.5)), 0)


@pytest.mark.parametrize(
    ("structured", "part", "dropout"),
    [
        ({"heads": 0.5}, "attn", "attn_drop"),
        ({"heads": 0.5}, "attn", "proj_drop"),
        ({"neurons": 0.5}, "mlp", "drop1"),
        ({"neurons": 0.5}, "mlp", "drop2"),
    ],
)
def test_dropout_is_refused_where_it_is(structured: dict[str, float], part: str, dropout: str) -> None:
    (field,) = structured
    model = build_dense(MODEL)
    getattr(getattr(model.blocks[1], part), dropout).p = 0.1
    with pytest.raises(
        OptionError, match=rf"^{field} = 0.5: can't pack blocks.1.{part}, which has dropout \(.*{dropout}.*\), .*; leave"
    ):
        pack_units(model, **structured, seed=0)
    other = {"heads": 1.0, "neurons": 0.5} if "heads" in structured else {"heads": 0.5, "neurons": 1.0}
    pack_units(model, **other, seed=0)


@pytest.mark.parametrize(("structured", "part"), [({"heads": 0.5}, "attn"), ({"neurons": 0.5}, "mlp")])
def test_weights_packed_one_by_one_are_not_packed_by_units_too(structured: dict[str, float], part: str) -> None:
    (field,) = structured
    model = build_dense(MODEL)
    sparsify(model, 0.5)
    with pytest.raises(
        OptionError, match=rf"^{field} = 0.5: can't pack blocks.0.{part}, which holds layers packed by weights, .*; leave"
    ):
        pack_units(model, **structured, seed=0)


def frozen(model: VisionTransformer, name: str) -> VisionTransformer:
    model.get_parameter(name).requires_grad_(False)
    return model


def with_dropout(model: VisionTransformer) -> VisionTransformer:
    model.blocks[1].mlp.drop1.p = 0.1
    return model


def with_a_block_twice(model: VisionTransformer) -> VisionTransformer:
    model.blocks[1] = model.blocks[0]
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_dropout, "can't pack blocks.1.mlp, which has dropout"),
        (with_a_block_twice, "blocks.0.attn.qkv and blocks.1.attn.qkv share a parameter; untie them"),
        *(
            (
                partial(frozen, name=f"blocks.1.{name}"),
                f"can't pack blocks.1.{name.split('.')[0]}, which has frozen weights, .*; leave it at 1.0",
            )
            for name in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight")
        ),
    ],
)
def test_a_model_that_is_refused_is_left_as_it_was(
    spoil: Callable[[VisionTransformer], VisionTransformer], message: str
) -> None:
    model = spoil(build_dense(MODEL))
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(SviteScaleError, match=message):
        pack_units(model, heads=0.5, neurons=0.5, seed=0)
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()} == before


def test_a_frozen_bias_that_no_unit_owns_stays_frozen() -> None:
    model = frozen(build_dense(MODEL), "blocks.0.mlp.fc2.bias")
    pack_units(model, heads=0.5, neurons=0.5, seed=0)
    assert not model.get_parameter("blocks.0.mlp.fc2.bias").requires_grad


def test_sparsify_leaves_units_as_they_are() -> None:
    model = packed_vit()
    plan = sparsify(model, 0.5)
    assert [entry.name for entry in plan] == ["patch_embed.proj", "head"]


def test_neurons_by_unit_and_attention_by_weight_go_together() -> None:
    sparsity = SparsityConfig(structured=StructuredConfig(neurons=0.5), density=0.3)
    model, plan = build_sparse(MODEL, sparsity, 0)
    listed = build_sparse(MODEL, replace(sparsity, keep_dense=("blocks.*.mlp.*",)), 0)
    assert listed[1] == plan, "keep_dense may list what is packed by units"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), listed[0].parameters(), strict=True))
    kinds = {layer.unit for layer in sparse_layers(model).values()}
    assert kinds == {"neurons", "weights"}
    assert [entry.name for entry in plan][:4] == [
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
    ]
    weights = [entry for entry in plan if not entry.in_units]
    assert sum(e.num_active for e in weights) == round(0.3 * sum(e.numel for e in weights))
