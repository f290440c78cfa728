"""A ViT of packed heads and neurons, and its dense twin, whose absent units are candidates: of no effect, but with scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.models.structure import pack_units
from svite_scale.sparsity.layers.base import SparseLayer, sparse_layers
from tests import reference

TINY = {"image_size": 12, "patch_size": 4, "in_channels": 1, "embed_dim": 12, "depth": 2, "num_heads": 6, "num_classes": 5}
MODEL = ModelConfig(name="vit_tiny_patch16_224", **TINY)
SEED = 3

Build = Callable[[], VisionTransformer]
"""Makes a dense model."""


def build_model() -> VisionTransformer:
    return build_dense(MODEL)


def packed_vit(
    build: Build = build_model,
    *,
    heads: float = 0.5,
    neurons: float = 0.6,
    grow: str = "candidate",
    init: str = "dense",
) -> VisionTransformer:
    torch.manual_seed(SEED)
    model = build()
    pack_units(model, heads=heads, neurons=neurons, grow=grow, init=init, seed=SEED)
    return model.double()


def active_units(layer: SparseLayer) -> Tensor:
    """Bool ``[N]``, unpacked by numpy."""
    flat = np.unpackbits(layer.mask.numpy(), bitorder="little")[: layer.shape.numel()]
    return torch.from_numpy(flat.astype(bool))


def block_of(model: nn.Module, layer: SparseLayer) -> nn.Module:
    """The block of a model that a layer stands in."""
    return model.get_submodule(".".join(layer.name.split(".")[:2]))


def candidate_rows(layer: SparseLayer, step: int, std: float) -> Tensor:
    """Incoming weights of every unit's candidate, ``[units, any]``, number by number."""
    dense_numel = layer.shape.numel() * layer.candidate_numel  # type: ignore[attr-defined]
    numbers = reference.hashed_uniform(SEED, step, f"{layer.name}/candidates", range(dense_numel))
    return (torch.tensor(numbers, dtype=torch.float64).view(layer.shape.numel(), -1) - 0.5) * 12**0.5 * std


@torch.no_grad()
def set_neurons(mlp: nn.Module, chosen: Tensor, rows: Tensor | float) -> None:
    """Gives some neurons, bool ``[N]``, these incoming weights, no bias, and outgoing weights of 0."""
    mlp.fc1.weight[chosen] = rows[chosen] if isinstance(rows, Tensor) else rows
    mlp.fc1.bias[chosen] = 0.0
    mlp.fc2.weight[:, chosen] = 0.0


@torch.no_grad()
def set_heads(attn: nn.Module, chosen: Tensor, rows: Tensor | float) -> None:
    """The same for heads, whose incoming weights are those of queries, keys and values."""
    heads, width, features = attn.num_heads, attn.head_dim, attn.qkv.in_features
    by_head = attn.qkv.weight.view(3, heads, width, features)
    by_head[:, chosen] = rows.view(heads, 3, width, features).transpose(0, 1)[:, chosen] if isinstance(rows, Tensor) else rows
    attn.qkv.bias.view(3, heads, width)[:, chosen] = 0.0
    attn.proj.weight.view(-1, heads, width)[:, chosen] = 0.0


def dense_twin(packed: nn.Module, build: Build = build_model, *, step: int = 1, trained: bool = False) -> VisionTransformer:
    """The dense float64 model of the same function, with candidates for the update after ``step`` as absent units.

    Its weights are drawn as the packed model's were; if that was ``trained``, they are the packed model's present ones.
    """
    torch.manual_seed(SEED)
    twin = build()
    stds = {
        name: float(
            (block_of(twin, layer).mlp.fc1 if layer.unit == "neurons" else block_of(twin, layer).attn.qkv).weight.detach().std()
        )
        for name, layer in sparse_layers(packed).items()
    }
    twin = dense_of(packed, build) if trained else twin.double()
    for name, layer in sparse_layers(packed).items():
        block, rows = block_of(twin, layer), candidate_rows(layer, step, stds[name])
        if layer.unit == "neurons":
            set_neurons(block.mlp, ~active_units(layer), rows)
        else:
            set_heads(block.attn, ~active_units(layer), rows)
    return twin


@torch.no_grad()
def dense_of(packed: nn.Module, build: Build) -> VisionTransformer:
    """A dense model with the packed one's present weights, and zeros for absent units."""
    dense = build().double()
    state = dict(packed.state_dict())
    for layer in sparse_layers(packed).values():
        prefix, active = ".".join(layer.name.split(".")[:3]), active_units(layer)
        units = layer.shape.numel()
        first, last = ("fc1", "fc2") if layer.unit == "neurons" else ("qkv", "proj")
        repeats = 1 if layer.unit == "neurons" else 3
        for key in (f"{prefix}.{first}.weight", f"{prefix}.{first}.bias"):
            rows = state[key].view(repeats, layer.num_active, -1)
            whole = rows.new_zeros(repeats, units, rows.shape[2])
            whole[:, active] = rows
            state[key] = whole.view(dense.state_dict()[key].shape)
        rows = state[f"{prefix}.{last}.weight"].view(layer.num_active, -1, state[f"{prefix}.{last}.weight"].shape[1])
        whole = rows.new_zeros(units, *rows.shape[1:])
        whole[active] = rows
        state[f"{prefix}.{last}.weight"] = whole.flatten(0, 1).t()
        del state[f"{prefix}.mask"]
    dense.load_state_dict(state)
    return dense


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 12, 12, generator=generator, dtype=torch.float64), torch.arange(size) % 5


def loss_of(model: nn.Module, seed: int = 0, attn_mask: Tensor | None = None) -> Tensor:
    images, labels = batch(seed)
    return nn.functional.cross_entropy(model(images, attn_mask=attn_mask), labels)
