"""The first values of active weights, drawn by fan-in and gain, are the same on every engine and rank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from svite_scale.config.schema import SparsityConfig
from svite_scale.models.options import ModelConfig, StructuredConfig
from svite_scale.models.sparse import build_sparse
from tests.engines.engines import SHARED, adamw, build_backend
from tests.ranks import run_on_ranks

GAIN = 1.5
SIZES = {"image_size": 14, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 4, "in_channels": 1, "num_classes": 10}


def drawn_vit() -> nn.Module:
    """A ViT with weights in blocks, single weights, and half of its heads."""
    config = ModelConfig(name="vit_tiny_patch16_224", init_gain=GAIN, **SIZES)  # type: ignore[arg-type]
    sparsity = SparsityConfig(density=0.3, block=(16, 1), structured=StructuredConfig(heads=0.5))
    return build_sparse(config, sparsity, seed=4).model


def read_values(kind: str) -> dict[str, Tensor]:
    """Every parameter as the engine has it in fp32, flat. Runs on every rank."""
    torch.manual_seed(dist.get_rank())  # what a rank has drawn before makes no difference
    backend = build_backend(kind, drawn_vit(), adamw)
    return {name: backend.access.read(each).flatten() for name, each in backend.model.named_parameters()}


@pytest.mark.parametrize("kind", SHARED)
def test_two_ranks_begin_with_the_values_of_one_process(kind: str) -> None:
    expected = {name: parameter.detach().flatten() for name, parameter in drawn_vit().named_parameters()}
    for found in run_on_ranks(2, read_values, kind):
        assert found.keys() == expected.keys()
        assert all(torch.equal(values, expected[name]) for name, values in found.items())


def test_values_have_the_spread_of_the_gain_and_of_the_active_inputs() -> None:
    for name, values in drawn_vit().named_parameters():
        layer = name.split(".", 2)[-1]
        inputs = {"attn.qkv.weight": 48, "attn.proj.weight": 24}.get(layer)
        if inputs is not None:  # half of the heads are half of the inputs of proj
            error = 5 / math.sqrt(2 * values.numel())
            assert float(values.detach().std()) == pytest.approx(GAIN / math.sqrt(inputs), rel=error)
