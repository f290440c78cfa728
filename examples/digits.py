"""The data and the model of the examples: scikit-learn's 1,797 real digits of 8x8 pixels, and a small vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

NUM_TEST = 297
SEED = 0


def load() -> tuple[TensorDataset, TensorDataset]:
    """Returns 1,500 digits to train on, and 297 others to test on: images ``[1, 8, 8]`` in -1 .. 1, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    data = TensorDataset(images, torch.tensor(labels))
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED))
    return TensorDataset(*data[shuffled[NUM_TEST:]]), TensorDataset(*data[shuffled[:NUM_TEST]])


def build_model() -> VisionTransformer:
    """Returns a dense ViT of 4 patches and 3 blocks, with the same initial weights on every rank."""
    torch.manual_seed(SEED)
    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4)


def summary(updates: Sequence[Any]) -> str:
    """Returns one line about an epoch's topology updates. ``updates`` is everything that ``topology.step()`` returned in it."""
    done = [update for update in updates if update is not None]
    layers = [layer for update in done for layer in update.layers.values()]
    dropped, regrown = sum(layer.dropped for layer in layers), sum(layer.regrown for layer in layers)
    return f"topology updates {len(done)}, dropped {dropped}, regrown {regrown}"
