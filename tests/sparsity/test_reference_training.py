"""Packed training against the naive dense-masked reference in float64: gradients, dropped and grown sets, weights, moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.parallel.torch_access import TorchAccess
from svite_scale.sparsity.layers import PackedLayer
from svite_scale.sparsity.schedules import UpdateSchedule
from svite_scale.sparsity.sparsify import sparsify
from svite_scale.sparsity.topology import TopologyEngine
from tests import reference

STEPS, UPDATE_EVERY, STOP = 20, 4, 16
LR, WEIGHT_DECAY = 1e-2, 0.05
CLIP = 0.1


def dense_model() -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**sizes, in_chans=1, mlp_ratio=2.0, init_values=0.5).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 1, 12, 12, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (6,), generator=generator)


def dense_mask(layer: PackedLayer) -> Tensor:
    """The layer's mask, unpacked by numpy."""
    flat = np.unpackbits(layer.mask.numpy(), bitorder="little")[: layer.shape.numel()]
    return torch.from_numpy(flat.astype(bool)).view(layer.shape)


class PackedTrainer:
    """The package's own pieces in a plain loop, on one process."""

    def __init__(self, grown_moments: str) -> None:
        self.model = dense_model()
        sparsify(self.model, 0.3)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = UpdateSchedule(total_steps=STEPS, update_every=UPDATE_EVERY)
        self.topology = TopologyEngine(self.model, TorchAccess(self.optimizer), schedule, grown_moments=grown_moments)
        self.heard: dict[str, Tensor] = {}

    def backward(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.heard = {name: self.topology.scores.gather(layer) for name, layer in self.topology.layers.items() if self.listens}
        return float(loss.detach())

    @property
    def listens(self) -> bool:
        return next(iter(self.topology.layers.values())).gradient_sink is not None


def assert_close(actual: Tensor | None, expected: Tensor, what: str) -> None:
    assert actual is not None, what
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def assert_gradients(packed: PackedTrainer, naive: reference.MaskedTrainer, step: int) -> None:
    layers = packed.topology.layers
    for name, parameter in packed.model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in layers and kind in ("values", "mask"):
            continue
        assert_close(parameter.grad, naive.gradients[name], f"{name} in step {step}")
    for name, layer in layers.items():
        mask = naive.masks[f"{name}.weight"]
        assert_close(layer.values.grad, naive.gradients[f"{name}.weight"][mask], f"{name} in step {step}")
        assert (name in packed.heard) == (step % UPDATE_EVERY == 0 and step <= STOP), "scores are heard in update steps only"
        if name in packed.heard:
            dense = naive.gradients[f"{name}.weight"].flatten().abs().float()
            torch.testing.assert_close(packed.heard[name], dense, rtol=1e-6, atol=1e-9)


def assert_state(packed: PackedTrainer, naive: reference.MaskedTrainer, step: int) -> None:
    """Weights and moments, each expanded and compared in full."""
    layers = packed.topology.layers
    for name, parameter in packed.model.named_parameters():
        if name in naive.weights:
            assert_close(parameter, naive.weights[name], f"{name} after step {step}")
    for name, layer in layers.items():
        weight = f"{name}.weight"
        mask = naive.masks[weight]
        assert torch.equal(dense_mask(layer), mask), f"{name} after step {step}"
        assert_close(layer.values, naive.weights[weight][mask], f"{name} after step {step}")
        state = packed.optimizer.state[layer.values]
        for moment, expected in zip(("exp_avg", "exp_avg_sq"), naive.moments[weight], strict=True):
            assert not expected[~mask].any()
            assert_close(state[moment], expected[mask], f"{moment} of {name} after step {step}")


@pytest.mark.parametrize("grown_moments", ["mean", "zero"])
def test_packed_training_is_dense_masked_training(grown_moments: str) -> None:
    packed = PackedTrainer(grown_moments)
    layers = packed.topology.layers
    masks = {f"{name}.weight": dense_mask(layer) for name, layer in layers.items()}
    naive = reference.MaskedTrainer(dense_model(), masks, lr=LR, weight_decay=WEIGHT_DECAY, clip=CLIP)
    updates = regrown = came = 0
    for step in range(1, STEPS + 1):
        images, labels = batch(step)
        assert packed.backward(images, labels) == pytest.approx(naive.step(images, labels), rel=1e-9)
        assert_gradients(packed, naive, step)
        norm = nn.utils.clip_grad_norm_(packed.trainable, CLIP)
        assert norm > CLIP, "clipping is at work"
        packed.optimizer.step()
        update = packed.topology.step()
        assert (update is not None) == (step % UPDATE_EVERY == 0 and step <= STOP)
        if update is not None:
            updates += 1
            rate = reference.cosine_rate(0.5, 0.005, step, STOP)
            assert update.rate == pytest.approx(rate)
            for name, layer in layers.items():
                count = int(np.ceil(rate * layer.num_active))
                dropped, grown = naive.update(f"{name}.weight", count, grown_moments)
                assert update.layers[name].dropped == count
                assert update.layers[name].regrown == count - len(grown) == count - len(dropped)
                regrown, came = regrown + count - len(grown), came + len(grown)
        assert_state(packed, naive, step)
    assert updates == 4
    assert regrown > 0, "some weights were dropped and grown in one update"
    assert came > 100


def test_ever_active_is_the_union_of_all_masks() -> None:
    packed = PackedTrainer("mean")
    layers = packed.topology.layers
    seen = {name: dense_mask(layer) for name, layer in layers.items()}
    assert packed.topology.ever_active.fraction() == pytest.approx(0.3, abs=1e-3)
    total = sum(mask.numel() for mask in seen.values())
    for step in range(1, STEPS + 1):
        packed.backward(*batch(step))
        packed.optimizer.step()
        update = packed.topology.step()
        seen = {name: seen[name] | dense_mask(layer) for name, layer in layers.items()}
        assert update is None or update.ever_active == sum(int(mask.sum()) for mask in seen.values()) / total
    assert packed.topology.ever_active.fraction() > 0.35
