"""Multiply-accumulates and parameters: against literal figures, the paper, torch's own counter, and what layers really see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm.layers
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.cost.flops import count_flops
from svite_scale.models.options import ModelConfig, StructuredConfig, TokensConfig
from svite_scale.models.sparse import build_sparse, plan_sparse
from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import torch_block_products
from svite_scale.sparsity.layers.packed import PackedConv2d, PackedLayer, PackedLinear
from tests.cost.costs import count
from tests.sparsity.packing import packed_layers

CONFIGS = Path(__file__).parents[2] / "configs"

# By hand: 196 patches of 768 pixels into D; 12 blocks of 12 D^2 weights over 197 tokens and two products of 197^2 D; a head of
# 1000 D.
DENSE = {
    "tiny": (1_253_683_200, 5_717_416),
    "small": (4_598_882_304, 22_050_664),
    "base": (17_563_828_224, 86_567_656),
}


def deit(size: str, density: float) -> Config:
    model = ModelConfig(name=f"deit_{size}_patch16_224")
    return Config(run_dir="unused", model=model, sparsity=SparsityConfig(density=density, distribution="erk"))


@pytest.mark.parametrize("size", DENSE)
def test_dense_deit_costs_what_arithmetic_says(size: str) -> None:
    cost = count(deit(size, 1.0))
    assert (cost.dense_macs, cost.params_dense) == DENSE[size]
    assert (cost.sparse_macs, cost.params_active, cost.saving) == (cost.dense_macs, cost.params_dense, 0.0)
    assert cost.multiplied_macs == cost.dense_macs


def test_sparse_deit_tiny_saves_what_the_paper_says() -> None:
    cost = count(deit("tiny", 0.7))
    assert (cost.dense_macs, cost.params_dense) == DENSE["tiny"]
    assert 100 * cost.saving == pytest.approx(25.56, abs=0.05)
    assert cost.params_active / 1e6 == pytest.approx(4.02, abs=0.005)
    # Whole stay 12 blocks' biases and norms, the last norm, biases of patches and head, positions, and the class token.
    others = 12 * (3 * 192 + 192 + 768 + 192 + 4 * 192) + 2 * 192 + 192 + 1000 + 197 * 192 + 192
    assert cost.params_active - others == round(0.7 * (cost.params_dense - others))


@pytest.fixture
def unfused_attention() -> Iterator[None]:
    """Attention as two plain products, which torch's counter knows on every device."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "image_size": 40, "num_classes": 11, "in_channels": 1}
MODELS = {
    "class token": ModelConfig(name="vit_tiny_patch16_224", **SMALL),  # type: ignore[arg-type]
    "distilled": ModelConfig(name="deit_tiny_distilled_patch16_224", **SMALL),  # type: ignore[arg-type]
    "registers, average": ModelConfig(name="vit_wee_patch16_reg1_gap_256", **SMALL),  # type: ignore[arg-type]
    "differential attention": ModelConfig(name="vit_dwee_patch16_reg1_gap_256", **SMALL),  # type: ignore[arg-type]
}
WITH_HEADS = [name for name in MODELS if name != "differential attention"]
"""Those whose heads can be made sparse."""


@pytest.mark.usefixtures("unfused_attention")
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_half_of_what_torch_counts(name: str) -> None:
    """torch counts a multiply and an add as two operations."""
    config = MODELS[name]
    cost = count(Config(run_dir="unused", model=config))
    model, _ = build_sparse(config, SparsityConfig(), seed=0)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.randn(1, 1, 40, 40))
    assert 2 * cost.dense_macs == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert cost.params_dense == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_sparse_flops_are_active_weights_times_the_tokens_of_each_layer(name: str) -> None:
    model, _ = build_sparse(MODELS[name], SparsityConfig(density=0.5), seed=0)
    cost = count_flops(model, MODELS[name].image_size)
    seen: dict[str, int] = {}

    def count_rows(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, PackedLayer)
        features = output.shape[1] if isinstance(module, PackedConv2d) else output.shape[-1]
        set_bits = int(bits.unpack(module.mask, module.shape.numel()).sum())
        seen[module.name] = set_bits * (output.numel() // features)

    for module in model.modules():
        if isinstance(module, (PackedConv2d, PackedLinear)):
            module.register_forward_hook(count_rows)
    with torch.no_grad():
        model.eval()(torch.randn(1, 1, 40, 40))
    packed = {layer.name: layer.sparse_macs for layer in cost.layers if layer.sparse_macs < layer.dense_macs}
    assert len(packed) >= 10
    assert seen == packed
    assert all(layer.multiplied_macs == layer.dense_macs for layer in cost.layers), "single weights are multiplied dense"
    assert cost.params_active == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < cost.saving < 0.5, "attention's own products aren't shortened"


@pytest.mark.usefixtures("unfused_attention")
def test_layers_kept_dense_cost_what_torch_counts() -> None:
    """Their multiply-accumulates are in the dense count and in the sparse one; the others' fall with their density."""
    sparsity = SparsityConfig(density=0.3, keep_dense=("patch_embed.*", "blocks.*.mlp.fc2", "head"))
    model, _ = build_sparse(MODELS["class token"], sparsity, seed=0)
    cost = count_flops(model, MODELS["class token"].image_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.randn(1, 1, 40, 40))
    whole = counter.get_total_flops()
    kinds = counter.get_flop_counts()
    inactive = sum(
        sum(kinds[f"VisionTransformer.{layer.name}"].values()) * (1 - layer.num_active / layer.shape.numel())
        for layer in packed_layers(model).values()
    )
    assert sorted({layer.name.rpartition(".")[2] for layer in packed_layers(model).values()}) == ["fc1", "proj", "qkv"]
    assert 2 * cost.dense_macs == pytest.approx(whole, rel=1e-3)
    assert 2 * cost.sparse_macs == pytest.approx(whole - inactive, rel=1e-3)
    assert cost.saving == pytest.approx(inactive / whole, rel=1e-3)
    dense_twin = count(Config(run_dir="unused", model=MODELS["class token"]))
    assert (cost.dense_macs, cost.params_dense) == (dense_twin.dense_macs, dense_twin.params_dense)
    assert cost.params_active == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_flops_follow_masks_and_densities_of_the_config(tmp_path: Path) -> None:
    model, plan = build_sparse(MODELS["class token"], SparsityConfig(), seed=0)
    halves = {f"{entry.name}.weight": torch.arange(entry.numel).view(entry.shape) % 2 for entry in plan}
    save_file(halves, tmp_path / "masks")
    costs = [
        count(Config(run_dir="unused", model=MODELS["class token"], sparsity=sparsity))
        for sparsity in (
            SparsityConfig(masks=str(tmp_path / "masks")),
            SparsityConfig(densities={"*": 0.5}),
            SparsityConfig(density=0.5, distribution="uniform"),
        )
    ]
    assert costs[0] == costs[1] == costs[2]
    powers = [
        count(Config(run_dir="unused", model=MODELS["class token"], sparsity=SparsityConfig(density=0.3, power_scale=power)))
        for power in (0.5, 1.0)
    ]
    assert powers[0].sparse_macs != powers[1].sparse_macs
    assert powers[0].params_active == powers[1].params_active
    assert costs[0].sparse_macs < costs[0].dense_macs == count_flops(model, MODELS["class token"].image_size).dense_macs


IN_BLOCKS = ModelConfig(
    name="vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=4, patch_size=8, image_size=40, num_classes=11, in_channels=1
)


def test_blocks_are_multiplied_at_the_size_of_what_is_active() -> None:
    """The head's 11 rows are in no blocks. torch counts the operations of a layer's product."""
    sparsity = SparsityConfig(densities={"*": 0.3}, block=(16, 4), tokens=TokensConfig(keep=0.6, blocks=(1,)))
    model, _ = build_sparse(IN_BLOCKS, sparsity, seed=0)
    costs = {layer.name: layer for layer in count_flops(model, 40, device="cpu").layers}
    packed = packed_layers(model)
    assert [name for name, layer in packed.items() if layer.unit == "weights"] == ["head"]
    assert costs["head"].sparse_macs < costs["head"].multiplied_macs == costs["head"].dense_macs == 32 * 11
    tokens = {"patch_embed.proj": 25, "blocks.0": 26, "blocks.1": 16}  # of 26 tokens pass 16
    for name, layer in packed.items():
        if layer.unit == "blocks":
            x = torch.randn(next(count for start, count in tokens.items() if name.startswith(start)), layer.grid.matrix[1])
            with FlopCounterMode(display=False) as counter:
                torch_block_products.product(x, layer.values.detach(), layer.mask, None, torch.Size(layer.grid.matrix))
            assert 2 * costs[name].multiplied_macs == 2 * costs[name].sparse_macs == counter.get_total_flops(), name
            assert costs[name].dense_macs == layer.grid.shape.numel() * (25 if "patch" in name else 26)


@pytest.mark.parametrize(
    ("block", "device", "has_products"),
    [((8, 8), "cpu", False), ((16, 1), "cpu", True), ((16, 4), "cuda", False), ((16, 16), "cuda", True)],
)
def test_blocks_that_a_device_has_no_products_for_are_multiplied_dense(
    block: tuple[int, int], device: str, has_products: bool
) -> None:
    """The head is kept dense, since it would be in no blocks. A device that isn't there can be asked for."""
    model, _ = plan_sparse(IN_BLOCKS, SparsityConfig(density=0.3, block=block, keep_dense=("head",)))
    cost = count_flops(model, 40, device=device)
    assert cost.sparse_macs < cost.dense_macs
    assert cost.multiplied_macs == (cost.sparse_macs if has_products else cost.dense_macs)
    assert cost.device_type == device


STRUCTURES = {
    "heads": StructuredConfig(heads=0.7),
    "neurons": StructuredConfig(neurons=0.4),
    "both": StructuredConfig(heads=0.4, neurons=0.6),
    "the paper's": StructuredConfig(heads=0.7, neurons=0.7, grow="paper"),
}


@pytest.mark.usefixtures("unfused_attention")
@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_absent_heads_and_neurons_cost_nothing(name: str, structure: str) -> None:
    sparsity = SparsityConfig(structured=STRUCTURES[structure])
    cost = count(Config(run_dir="unused", model=MODELS[name], sparsity=sparsity))
    model, _ = build_sparse(MODELS[name], sparsity, seed=0)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.eval()(torch.randn(1, 1, 40, 40))
    dense = count(Config(run_dir="unused", model=MODELS[name]))
    assert (cost.dense_macs, cost.params_dense) == (dense.dense_macs, dense.params_dense)
    assert 2 * cost.sparse_macs == pytest.approx(counter.get_total_flops(), rel=1e-3)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert cost.multiplied_macs == cost.sparse_macs
    # In the paper's variant the projection holds columns that no product reads.
    assert cost.params_active == trainable
    assert 0.05 < cost.saving < 0.6


@pytest.mark.usefixtures("unfused_attention")
@pytest.mark.parametrize("name", ["deit_tiny_structured_s30", "deit_small_structured_s40", "deit_base_structured_s40"])
@pytest.mark.parametrize("keep", [None, 0.9, 0.7, 0.5])
def test_shipped_configs_cost_what_torch_counts_layer_by_layer(name: str, keep: float | None) -> None:
    """Heads, neurons and tokens together, at full size, on the meta device; and before a later block too."""
    config = read_config(CONFIGS / f"{name}.yaml")
    sparsity = replace(config.sparsity, tokens=TokensConfig(keep=keep, blocks=(0, 6)) if keep else TokensConfig())
    model, _ = plan_sparse(config.model, sparsity)
    cost = count_flops(model, config.model.image_size)
    counter = FlopCounterMode(display=False, depth=None)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    counted = {key.partition(".")[2]: sum(flops.values()) for key, flops in counter.get_flop_counts().items()}
    scores = [layer for layer in cost.layers if "selector" in layer.name]  # no matrix products, so torch doesn't count them
    for layer in set(cost.layers) - set(scores):
        children = ("qkv", "proj") if layer.name.endswith(".attn") else ()
        products = counted[layer.name] - sum(counted[f"{layer.name}.{child}"] for child in children)
        assert 2 * layer.sparse_macs == pytest.approx(products, rel=1e-3), layer.name
    macs = cost.sparse_macs - sum(layer.sparse_macs for layer in scores)
    assert 2 * macs == pytest.approx(counter.get_total_flops(), rel=1e-3)
