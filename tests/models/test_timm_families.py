"""Small models of timm's families trained sparse by ``sparsify`` alone, beside dense ones in plain torch with masked weights.

The families are those whose code reads its layers' weights or attributes, and others of every build.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

import svite_scale
from svite_scale.sparsity.layers.packed import PackedLayer
from tests import reference
from tests.sparsity.packing import packed_layers

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 4}
STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 16), "num_heads": (2, 2, 2, 2)}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, **VIT}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, **VIT}),
    "coat": (
        "coat_lite_tiny",
        32,
        {"img_size": 32, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 2), "mlp_ratios": (2, 2, 2, 2)},
    ),
    "convit": ("convit_tiny", 32, {"img_size": 32, **VIT}),
    "convnext": ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}),
    "davit": ("davit_tiny", 64, STAGES),
    "deit": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, **VIT}),
    "edgenext": ("edgenext_xx_small", 64, {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}),
    "eva": ("eva02_tiny_patch14_224", 28, {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "ghostnet": ("ghostnet_050", 32, {"drop_rate": 0.0}),
    "levit": (
        "levit_128s",
        64,
        {"img_size": 64, "embed_dim": (16, 16, 16), "num_heads": (2, 2, 2), "depth": (1, 1, 1), "key_dim": 8},
    ),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 2, 2)}),
    "pvt_v2": ("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 2, 2)}),
    "regnet": ("regnetx_002", 32, {}),
    "resnet": ("resnet10t", 32, {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "drop_path_rate": 0.0, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 2)},
    ),
    "swin_v2": (
        "swinv2_tiny_window8_256",
        64,
        {"img_size": 64, "drop_path_rate": 0.0, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 2)},
    ),
    "tnt": (
        "tnt_s_legacy_patch16_224",
        32,
        {"img_size": 32, "embed_dim": 24, "inner_dim": 8, "depth": 1, "num_heads_outer": 4, "num_heads_inner": 2},
    ),
    "twins": ("twins_svt_small", 64, {"img_size": 64, **STAGES}),
    "vit with registers": ("vit_small_patch14_reg4_dinov2", 28, {"img_size": 28, **VIT}),
    "xcit": ("xcit_nano_12_p16_224", 32, {"img_size": 32, **VIT}),
}
STEPS = 3
LARGEST = 5_000
"""Elements of a layer whose update is told by sorting lists."""


def mask_of(layer: PackedLayer) -> Tensor:
    """Bool, shaped like the weight, unpacked by numpy."""
    flat = np.unpackbits(np.array(layer.mask.tolist(), dtype=np.uint8), bitorder="little")[: layer.shape.numel()]
    return torch.from_numpy(flat.astype(bool)).view(layer.shape)


def loss_of(output: Any) -> Tensor:
    """Of logits, or of those of the heads of a distilled model."""
    logits = sum(output) if isinstance(output, tuple) else output
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 5)


@pytest.mark.parametrize("family", MODELS)
def test_a_family_trains_sparse(family: str) -> None:
    """Three steps of SGD and a topology update: losses, gradients, and which weights are dropped and grown."""
    name, size, options = MODELS[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double()
    twin = copy.deepcopy(model)
    svite_scale.sparsify(model, density=0.3, init="dense")
    layers = {f"{name}.weight": layer for name, layer in packed_layers(model).items()}
    assert len(layers) > 3
    masks = {key: mask_of(layer) for key, layer in layers.items()}
    weights = {key: (weight * masks.get(key, 1)).detach() for key, weight in twin.named_parameters()}
    gradients: dict[str, Tensor] = {}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = {"total_steps": 100, "update_every": STEPS, "drop_fraction": 0.3, "drop_schedule": "constant"}
    topology = svite_scale.attach(model, optimizer, **schedule)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        leaves = {key: weight.requires_grad_() for key, weight in weights.items()}
        expected = loss_of(functional_call(twin, leaves, (x,)))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
        found = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
        gradients = {
            key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
        }
        for key, layer in layers.items():
            assert layer.values.grad is not None, f"{key} takes no part"
            torch.testing.assert_close(layer.values.grad, gradients[key][masks[key]], rtol=1e-6, atol=1e-9)
        weights = {key: (weight - 0.05 * gradients[key] * masks.get(key, 1)).detach() for key, weight in weights.items()}
        optimizer.step()
        topology.step()
    for key, layer in layers.items():
        if layer.shape.numel() > LARGEST:
            continue
        active = masks[key].flatten().tolist()
        drop, grow = weights[key].flatten().abs().tolist(), gradients[key].flatten().abs().float().tolist()
        after = reference.prune_and_grow(active, drop, grow, math.ceil(0.3 * sum(active)))
        assert mask_of(layer).flatten().tolist() == after, key
