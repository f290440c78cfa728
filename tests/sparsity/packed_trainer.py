"""A small packed training on one process, and its naive twin."""

from __future__ import annotations

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.engines.torch_access import TorchAccess
from svite_scale.sparsity.block_grid import SINGLE
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.packing import sparsify
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.sparsity.topology.statistics import TopologyUpdate
from tests import reference
from tests.sparsity.packing import packed_layers, positions_of_units

STEPS, UPDATE_EVERY, STOP = 20, 4, 16
LR, WEIGHT_DECAY = 1e-2, 0.05
CLIP = 0.1


def dense_model(width: int = 12) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": width, "depth": 2, "num_heads": width // 4, "num_classes": 5}
    return VisionTransformer(**sizes, in_chans=1, mlp_ratio=2.0, init_values=0.5).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 1, 12, 12, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (6,), generator=generator)


def active_units(layer: PackedLayer) -> list[bool]:
    """The layer's mask, unpacked by numpy."""
    flat: list[bool] = np.unpackbits(layer.mask.numpy(), bitorder="little")[: layer.shape.numel()].astype(bool).tolist()
    return flat


class PackedTrainer:
    """The package's own pieces in a plain loop, on one process."""

    def __init__(self, options: TopologyOptions | None = None, block: tuple[int, int] = SINGLE) -> None:
        # A width that blocks of 16 rows divide: those are multiplied at the size of what is active.
        self.width = 12 if block == SINGLE else 16
        self.model = dense_model(self.width)
        sparsify(self.model, 0.3, block=block, init="dense")
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = UpdateSchedule(total_steps=STEPS, update_every=UPDATE_EVERY)
        self.topology = TopologyEngine(self.model, TorchAccess(self.model, self.optimizer), schedule, options)
        self.recorded: dict[str, Tensor] = {}

    def backward(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        growth = self.topology.growth
        self.recorded = {name: growth.gather(layer) for name, layer in self.topology.layers.items() if name in growth.sums}
        return float(loss.detach())

    def naive_twin(self) -> reference.MaskedTrainer:
        """With the same weights and masks."""
        layers: dict[str, PackedLayer] = {f"{name}.weight": layer for name, layer in packed_layers(self.model).items()}
        return reference.MaskedTrainer(
            dense_model(self.width),
            {name: active_units(layer) for name, layer in layers.items()},
            {name: layer.grid.block for name, layer in layers.items()},
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            clip=CLIP,
        )

    def step(self) -> TopologyUpdate | None:
        """Clips, steps, and updates the topology if it is due."""
        norm = nn.utils.clip_grad_norm_(self.trainable, CLIP)
        assert norm > CLIP, "clipping is at work"
        self.optimizer.step()
        return self.topology.step()


def assert_close(actual: Tensor | None, expected: Tensor, what: str) -> None:
    assert actual is not None, what
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def active_elements(layer: PackedLayer, dense: Tensor) -> Tensor:
    """The elements of a dense tensor where the layer is active, shaped like its values."""
    positions = positions_of_units(layer.grid.shape, layer.grid.block)
    return dense.flatten()[positions[torch.tensor(active_units(layer))]].view(layer.values.shape)


def assert_state(packed: PackedTrainer, naive: reference.MaskedTrainer, step: int) -> None:
    """Weights and moments, each expanded and compared in full."""
    for name, parameter in packed.model.named_parameters():
        if name in naive.weights:
            assert_close(parameter, naive.weights[name], f"{name} after step {step}")
    for name, layer in packed_layers(packed.model).items():
        weight = f"{name}.weight"
        assert active_units(layer) == naive.active_units(weight), f"{name} after step {step}"
        assert_close(layer.values, active_elements(layer, naive.weights[weight]), f"{name} after step {step}")
        state = packed.optimizer.state[layer.values]
        for moment, expected in zip(("exp_avg", "exp_avg_sq"), naive.moments[weight], strict=True):
            assert not expected[~naive.masks[weight]].any()
            assert_close(state[moment], active_elements(layer, expected), f"{moment} of {name} after step {step}")
