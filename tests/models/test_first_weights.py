"""First weights of a whole model: the gain of its dense layers, and what heads, neurons and packed layers make of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svite_scale.errors import ConfigError, OptionError
from svite_scale.models.dense import build_dense, draw_linear_layers
from svite_scale.models.options import ModelConfig, SparseModelOptions
from svite_scale.models.sparse import build_sparse, plan_sparse
from svite_scale.sparsity.layers.base import sparse_layers
from tests.models.unit_twins import build_model, packed_vit

SIZES = {"image_size": 8, "patch_size": 4, "in_channels": 1, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
IN_BLOCKS = {"attn.qkv": 64, "attn.proj": 64, "mlp.fc1": 64, "mlp.fc2": 256}
"""Inputs of the linear layers of a block."""


def config(**changes: object) -> ModelConfig:
    return ModelConfig(name="vit_tiny_patch16_224", **(SIZES | changes))  # type: ignore[arg-type]


def built(gain: float | None, sparsity: SparseModelOptions | None = None) -> dict[str, Tensor]:
    """The weights, from a seed."""
    if sparsity is not None:
        model = build_sparse(config(init_gain=gain), sparsity, seed=3).model
    else:
        torch.manual_seed(3)
        model = build_dense(config(init_gain=gain))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def in_blocks(name: str) -> bool:
    return name.startswith("blocks.") and name.split(".", 2)[2] in {f"{layer}.weight" for layer in IN_BLOCKS}


def test_the_gain_sets_the_spread_of_linear_layers_in_blocks_only() -> None:
    weights, timms = built(1.5), built(None)
    assert sum(map(in_blocks, weights)) == 8
    for name, weight in weights.items():
        if in_blocks(name):
            inputs = IN_BLOCKS[name.split(".", 2)[2].removesuffix(".weight")]
            assert weight.shape[1] == inputs
            # 5 standard deviations of the estimate of a spread.
            expected, error = 1.5 / math.sqrt(inputs), 5 / math.sqrt(2 * weight.numel())
            assert float(weight.std()) == pytest.approx(expected, rel=error)
            assert float(timms[name].std()) == pytest.approx(0.02, rel=error)
        else:
            assert torch.equal(weight, timms[name]), name


def test_weights_are_a_function_of_the_seed() -> None:
    first, again = built(1.5), built(1.5)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())


def test_fan_in_and_gain_go_together() -> None:
    sparse = SparseModelOptions(density=0.25, distribution="uniform")
    for name, values in built(1.5, sparse).items():
        if name.startswith("blocks.") and name.endswith(".values"):
            inputs = IN_BLOCKS[name.split(".", 2)[2].removesuffix(".values")]
            expected, error = 1.5 / math.sqrt(0.25 * inputs), 5 / math.sqrt(2 * values.numel())
            assert float(values.std()) == pytest.approx(expected, rel=error), name


def test_layers_of_zeros_stay_zero() -> None:
    torch.manual_seed(0)
    model = build_dense(config())
    nn.init.zeros_(model.get_parameter("blocks.1.mlp.fc2.weight"))
    draw_linear_layers(model, 2.0)
    assert not model.get_parameter("blocks.1.mlp.fc2.weight").any()
    assert float(model.get_parameter("blocks.0.mlp.fc2.weight").detach().std()) == pytest.approx(2.0 / 16, rel=0.05)


def test_the_gain_is_refused_where_it_has_no_effect(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^init_gain = 2\.0: isn't used where weights is given; leave it out$"):
        config(init_gain=2.0, weights=str(tmp_path))
    with pytest.raises(OptionError, match=r"^init_gain = 0: is not above 0"):
        config(init_gain=0)
    model = ModelConfig(name="vgg11", num_classes=10, image_size=32, init_gain=2.0)
    with pytest.raises(ConfigError, match=r"^model\.init_gain = 2\.0: draws the linear layers of blocks, but vgg11 has none"):
        plan_sparse(model, SparseModelOptions())


@pytest.mark.parametrize("grow", ["candidate", "paper"])
def test_outgoing_weights_of_units_are_raised_and_incoming_ones_are_not(grow: str) -> None:
    raised = packed_vit(grow=grow, init="fan_in")
    plain = packed_vit(grow=grow, init="dense")
    factors = {"attn.proj.weight": math.sqrt(6 / 3), "mlp.fc2.weight": math.sqrt(48 / 28)}
    for name, weight in raised.named_parameters():
        if weight.requires_grad:
            factor = factors.get(name.split(".", 2)[-1], 1.0)
            torch.testing.assert_close(weight, plain.get_parameter(name) * factor, rtol=3e-7, atol=0.0)
    spreads = [{name: layer.candidate_std for name, layer in sparse_layers(model).items()} for model in (raised, plain)]
    assert spreads[0] == spreads[1]
    for name, layer in sparse_layers(plain).items():  # of the dense incoming weights
        first = "attn.qkv" if layer.unit == "heads" else "mlp.fc1"
        torch.manual_seed(3)
        dense = build_model().get_submodule(f"{name.rsplit('.', 2)[0]}.{first}").weight
        assert layer.candidate_std == float(dense.detach().std())
