"""Small packed models on any engine, for functions that run on ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from timm.models import VisionTransformer
from torch import nn

from svite_scale.config.schema import SparsityConfig
from svite_scale.engines.backend import Backend, EngineOptions
from svite_scale.models.dense import blocks, build_dense
from svite_scale.models.options import ModelConfig, StructuredConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity.block_grid import SINGLE, BlockGrid
from svite_scale.sparsity.packing import BLOCK_TYPE, PACKED_TYPE, prunable_layers, random_mask, replace_module
from svite_scale.sparsity.parameter_groups import parameter_groups
from tests.runs import ENGINES
from tests.sparsity.packing import packed_layers

SHARED = tuple(kind for kind in ENGINES if kind != "single")
"""The engines that run on several ranks."""

OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]


def units_vit() -> nn.Module:
    """A small ViT of which half the heads and neurons are active."""
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=14,
        patch_size=7,
        embed_dim=24,
        depth=2,
        num_heads=6,
        in_channels=1,
        num_classes=10,
    )
    sparsity = SparsityConfig(structured=StructuredConfig(heads=0.5, neurons=0.5))
    return build_sparse(config, sparsity, seed=0)[0]


def small_vit(
    *, checkpointing: bool = False, density: float = 0.3, depth: int = 2, block: tuple[int, int] = SINGLE
) -> VisionTransformer:
    """A packed ViT for 1 x 14 x 14 images, the same on every rank, whose counts no world size from 2 to 4 divides."""
    torch.manual_seed(0)
    model = build_dense(
        ModelConfig(
            name="vit_tiny_patch16_224",
            image_size=14,
            patch_size=7,
            embed_dim=20 if block == SINGLE else 32,
            depth=depth,
            num_heads=4,
            in_channels=1,
            num_classes=10,
            activation_checkpointing=checkpointing,
        )
    )
    pack_awkwardly(model, density, block)
    return model


def pack_awkwardly(model: nn.Module, density: float, block: tuple[int, int] = SINGLE) -> None:
    """Packs every prunable layer to the nearest count of weights, or of blocks, above ``density`` that neither 2 nor 3 divides.

    Layers that the block doesn't divide have single weights.
    """
    for name, dense in prunable_layers(model).items():
        grid = BlockGrid(dense.weight.shape, block)
        grid, types = (grid, BLOCK_TYPE) if block != SINGLE and grid.fits() else (BlockGrid(dense.weight.shape), PACKED_TYPE)
        num_active = next(count for count in range(int(density * grid.num_blocks), 10**9) if math.gcd(count, 6) == 1)
        packed = types[type(dense)](dense, num_active, name, grid.block)  # type: ignore[arg-type]
        packed.set_weight(dense.weight, random_mask(grid.num_blocks, num_active, 0, name))
        replace_module(model, name, packed)


def build_backend(
    kind: str,
    model: nn.Module,
    optimizer_of: OptimizerOf,
    *,
    micro_batch_size: int = 1,
    accumulation_steps: int = 1,
    bf16: bool = False,
    clip: float | None = 1.0,
    skip_nonfinite: bool = False,
    device: str = "cpu",
) -> Backend:
    """An engine by its short name: ``single``, ``ddp``, ``fsdp2``, ``zero1``, ``zero2`` or ``zero3``. A collective."""
    options = EngineOptions(
        device=torch.device(device),
        wrap_units=blocks(model) if isinstance(model, VisionTransformer) else [],
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        bf16=bf16,
        clip_grad_norm=clip,
        skip_nonfinite=skip_nonfinite,
    )
    if kind.startswith("zero"):
        from svite_scale.engines.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(int(kind[-1]), model, optimizer_of, options)
    from svite_scale.engines.torch_backend import TorchBackend

    return TorchBackend(kind, model, optimizer_of, options)


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and packed values."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr)


def mask_digests(backend: Backend) -> dict[str, str]:
    """A digest of every layer's full mask. A collective."""
    layers = packed_layers(backend.model).items()
    return {name: hashlib.sha256(bytes(backend.access.read(layer.mask).tolist())).hexdigest() for name, layer in layers}
