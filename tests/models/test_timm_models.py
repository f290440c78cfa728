"""timm's models of every kind in a config: what they cost, by hand; which are refused, and why; what engines gather at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.errors import ConfigError
from svite_scale.models.dense import blocks, build_dense, check_model
from svite_scale.models.options import ModelConfig, StructuredConfig, TokensConfig
from svite_scale.models.sparse import plan_sparse
from tests.cost.costs import count

D = 24
"""Features of the small transformers below, whose 3 heads are 8 wide."""

SMALL: dict[str, Any] = {"image_size": 40, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": 3, "num_classes": 11}
"""25 patches of 3 * 64 numbers."""


@dataclass(frozen=True)
class Kind:
    """A model, and its multiply-accumulates by hand.

    Attributes:
        model: in a config.
        layers: of weights of Linear and Conv2d.
        others: of queries times keys, and of attention times values.
    """

    model: ModelConfig
    layers: int
    others: int


def small(name: str, tokens: int, in_block: int, classes: int = 11 * D, pool: tuple[int, int] = (0, 0)) -> Kind:
    """A transformer of 3 blocks, each of ``in_block`` weights applied to all tokens, and of a full self-attention."""
    layers = 25 * 3 * 64 * D + 3 * tokens * in_block + classes
    return Kind(ModelConfig(name=name, **SMALL), layers + pool[0], 3 * 2 * tokens**2 * D + pool[1])


def staged(name: str, image: int, width: int, per_pixel: tuple[int, int], window: int = 0) -> Kind:
    """A model in stages of 2, 2, 6 and 2 blocks. The first has an image's 4 x 4 patches as its pixels, each other a quarter as
    many and twice the width, by one product of 2 x 2 pixels.

    Args:
        name: timm's.
        image: pixels, height and width alike.
        width: features of the first stage.
        per_pixel: weights of a block that a pixel meets: so many per feature, and so many per pair of features.
        window: pixels among which a block's attention is.
    """
    layers, others, pixels = (image // 4) ** 2 * 48 * width, 0, (image // 4) ** 2
    for stage, depth in enumerate((2, 2, 6, 2)):
        if stage:
            pixels, width = pixels // 4, 2 * width
            layers += pixels * 4 * (width // 2) * width
        layers += depth * pixels * (per_pixel[0] * width + per_pixel[1] * width**2)
        others += depth * pixels * 2 * window * width
    own_width = {"embed_dim": D} if window else {}
    return Kind(ModelConfig(name=name, image_size=image, num_classes=11, **own_width), layers + 11 * width, others)


PLAIN = 12 * D**2
"""Queries, keys, values, projection, and an MLP four times as wide."""

KINDS = {
    "class token": small("vit_tiny_patch16_224", 26, PLAIN),
    "class and distillation tokens": small("deit_tiny_distilled_patch16_224", 27, PLAIN, classes=2 * 11 * D),
    "class and register tokens": small("vit_small_patch14_reg4_dinov2", 30, PLAIN),
    "average pooling": small("vit_base_patch16_gap_224", 25, PLAIN),
    # Keys, values and the products of one query over all patches; its projections, output and MLP once.
    "attention pooling": small("vit_base_patch16_siglip_224", 25, PLAIN, pool=(25 * 2 * D**2 + 10 * D**2, 2 * 25 * D)),
    "rotary": small("vit_small_patch16_dinov3", 30, PLAIN),
    # Three products of D x int(8 / 3 * D).
    "rotary, SwiGLU": small("eva02_tiny_patch14_224", 26, 4 * D**2 + 3 * D * 64),
    # It reads the weight of qkv instead of calling the layer.
    "weight read": small("beit_base_patch16_224", 26, PLAIN),
    # In windows of 7 x 7.
    "windows": staged("swin_tiny_patch4_window7_224", 224, D, (0, 12), window=49),
    # Depthwise 7 x 7, and an MLP four times as wide.
    "convolutions": staged("convnext_atto", 64, 40, (49, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_costs_what_arithmetic_says(kind: str) -> None:
    expected = KINDS[kind]
    cost = count(Config(run_dir="unused", model=expected.model, sparsity=SparsityConfig(densities={"*": 0.5})))
    assert cost.dense_macs == expected.layers + expected.others
    # Of every layer here half the weights is a whole number.
    assert cost.sparse_macs == expected.layers // 2 + expected.others
    with torch.device("meta"):
        weights = [module.weight for module in build_dense(expected.model).modules() if type(module) in (nn.Linear, nn.Conv2d)]
    assert cost.params_dense - cost.params_active == sum(weight.numel() // 2 for weight in weights)


def test_attention_pooling_gets_the_tokens_that_pass_last() -> None:
    """Half of 25 patches from the second block on, there being no class token. The selector has 4 queries."""
    sparsity = SparsityConfig(tokens=TokensConfig(keep=0.5, blocks=(1,)))
    cost = count(Config(run_dir="unused", model=KINDS["attention pooling"].model, sparsity=sparsity))
    layers = 25 * 192 * D + (25 + 13 + 13) * PLAIN + 13 * 2 * D**2 + 10 * D**2 + 11 * D
    assert cost.sparse_macs == layers + 2 * (25**2 + 2 * 13**2) * D + 2 * 13 * D + 4 * 25 * D
    assert cost.dense_macs == KINDS["attention pooling"].layers + KINDS["attention pooling"].others


def test_a_weight_that_is_transposed_first_counts_as_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 puts a linear function of its own in the place of torch's, for the rest of the process."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return input.matmul(weight.t()) if bias is None else input.matmul(weight.t()) + bias

    monkeypatch.setattr(nn.functional, "linear", linear)
    expected = KINDS["weight read"]
    cost = count(Config(run_dir="unused", model=expected.model, sparsity=SparsityConfig(densities={"*": 0.5})))
    assert (cost.dense_macs, cost.sparse_macs) == (expected.layers + expected.others, expected.layers // 2 + expected.others)


def test_activation_checkpointing_costs_nothing_more() -> None:
    model = KINDS["rotary"].model
    costs = [count(Config(run_dir="unused", model=replace(model, activation_checkpointing=on))) for on in (False, True)]
    assert costs[0] == costs[1]


REFUSED = {
    "batch norm": (
        {"name": "resnet18"},
        r"model.name = 'resnet18': normalises by the batch \(bn1 is a BatchNorm2d\), whose running statistics .*; use another",
    ),
    "layers of other classes": (
        {"name": "nfnet_f0"},
        r"model.name = 'nfnet_f0': isn't made of .* alone \(stem.conv1 is a ScaledStdConv2d\), .*; use another",
    ),
    "LSTM": (
        {"name": "sequencer2d_s"},
        r"model.name = 'sequencer2d_s': isn't made of .* \(\S+ is a LSTM\), .*; use another",
    ),
    "one layer twice": (
        {"name": "coat_lite_tiny"},
        r"model.name = 'coat_lite_tiny': has one layer in two places \(cpe1.proj and \S+.cpe.proj\), .*; use another",
    ),
    "no logits": (
        {"name": "gemma4_vit_167m_enc", "image_size": 48},
        "model.name = 'gemma4_vit_167m_enc': gives no logits, one number per class; use a model that classifies",
    ),
    "no such model": ({"name": "convnext_tyni"}, r"model.name = 'convnext_tyni': .* timm knows; did you mean convnext_tiny\?"),
    "image": (
        {"name": "swin_tiny_patch4_window7_224", "image_size": 50},
        r"model.image_size = 50: is not divisible by the patch size \(4\); use a multiple",
    ),
    "image that only the forward refuses": (
        {"name": "naflexvit_base_patch16_gap", "image_size": 8},
        r"model.image_size = 8: naflexvit_base_patch16_gap can't take such images \(.+\); use another, such as 384",
    ),
    "patches": (
        {"name": "mixer_s16_224", "patch_size": 8},
        "model.patch_size = 8: isn't taken by mixer_s16_224; leave it out",
    ),
    "width": ({"name": "convnext_tiny", "embed_dim": 64}, "model.embed_dim = 64: isn't taken by convnext_tiny; leave it out"),
    "depth": (
        {"name": "swin_tiny_patch4_window7_224", "depth": 3},
        "model.depth = 3: isn't taken by swin_tiny_patch4_window7_224; leave it out",
    ),
    "heads": ({"name": "convnext_tiny", "num_heads": 2}, "model.num_heads = 2: isn't taken by convnext_tiny; leave it out"),
    "stochastic depth": ({"name": "vgg11", "drop_path": 0.1}, "model.drop_path = 0.1: isn't taken by vgg11; leave it out"),
    "checkpointing": (
        {"name": "convit_tiny", "activation_checkpointing": True},
        "model.activation_checkpointing = True: isn't supported by convit_tiny; set it to false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_others_are_refused_for_a_reason(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_model(ModelConfig(**fields))


@pytest.mark.parametrize(("kind", "name"), [("rotary", "Eva"), ("convolutions", "ConvNeXt")])
@pytest.mark.parametrize(
    ("field", "sparsity"),
    [
        ("tokens.keep", SparsityConfig(tokens=TokensConfig(keep=0.5))),
        ("structured.heads", SparsityConfig(structured=StructuredConfig(heads=0.5))),
        ("structured.neurons", SparsityConfig(structured=StructuredConfig(neurons=0.5))),
    ],
)
def test_tokens_heads_and_neurons_are_refused_where_blocks_are_others(
    kind: str, name: str, field: str, sparsity: SparsityConfig
) -> None:
    message = rf"^sparsity.{field} = 0.5: needs the blocks of timm's VisionTransformer, .* a {name} have .*; leave it out"
    with pytest.raises(ConfigError, match=message):
        plan_sparse(KINDS[kind].model, sparsity)


@pytest.mark.parametrize("field", ["heads", "neurons"])
def test_blocks_without_an_attention_or_an_mlp_of_their_own_stay_whole(field: str) -> None:
    model = ModelConfig(name="vit_pwee_patch16_reg1_gap_256", image_size=32, num_classes=11)
    part = {"heads": "attn", "neurons": "mlp"}[field]
    message = rf"^sparsity.structured.{field} = 0.5: can't pack blocks.0.{part}, which isn't there: .*; leave it at 1.0"
    with pytest.raises(ConfigError, match=message):
        plan_sparse(model, SparsityConfig(structured=StructuredConfig(**{field: 0.5})))


GATHERED = {
    "vit_tiny_patch16_224": ("blocks", 12),
    "eva02_tiny_patch14_224": ("blocks", 12),
    "swin_tiny_patch4_window7_224": ("layers.*.blocks", 12),
    "convnext_atto": ("stages.*.blocks", 12),
    "twins_svt_small": ("blocks.*", 18),
    "edgenext_xx_small": ("stages.*.blocks", 12),
    "vit_pwee_patch16_reg1_gap_256": ("blocks", 16),
}


@pytest.mark.parametrize("name", GATHERED)
def test_engines_gather_the_innermost_lists_item_by_item(name: str) -> None:
    where, number = GATHERED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {module: path for path, module in model.named_modules()}
    found = [names[block] for block in blocks(model)]
    assert len(found) == number
    lists = {".".join("*" if part.isdigit() else part for part in path.split(".")[:-1]) for path in found}
    assert lists == {where}
