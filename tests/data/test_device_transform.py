"""Batches on the device: normalised, erased, mixed; labels smoothed exactly once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from svite_scale.data.options import AugmentConfig, DataConfig
from svite_scale.data.transforms import DeviceTransform

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 3, 1, 3, 2, 0])


def batch(size: int = 6, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (size, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def transform(training: bool = True, **augment: Any) -> DeviceTransform:
    return DeviceTransform(DataConfig(augment=AugmentConfig(**augment)), 5, CPU, training)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("training", [True, False])
def test_images_are_normalised(training: bool) -> None:
    images = batch()
    inputs, targets = transform(training, label_smoothing=0.1)(images, LABELS)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    expected = ((images.double() / 255).movedim(1, 3) - mean) / std
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double(), expected.movedim(3, 1), atol=1e-5, rtol=0)
    assert torch.equal(targets, LABELS)
    assert images.dtype == torch.uint8


def test_images_of_one_channel_are_normalised() -> None:
    data = DataConfig(mean=(0.1307,), std=(0.3081,))
    inputs, _ = DeviceTransform(data, 5, CPU, training=False)(batch(channels=1), LABELS)
    torch.testing.assert_close(inputs, (batch(channels=1) / 255 - 0.1307) / 0.3081, atol=1e-5, rtol=0)


def test_evaluation_never_augments() -> None:
    full: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 1.0, "label_smoothing": 0.1}
    evaluate = transform(training=False, **full)
    inputs, targets = evaluate(batch(5), LABELS[:5])
    assert torch.equal(inputs, transform(training=False)(batch(5), LABELS[:5])[0])
    assert torch.equal(targets, LABELS[:5])
    assert evaluate.loss_label_smoothing == 0


def test_erasing_replaces_one_rectangle_by_noise_per_pixel() -> None:
    plain = transform()(batch(), LABELS)[0]
    seed_all(0)
    erased = transform(random_erasing=1.0)(batch(), LABELS)[0]
    seed_all(0)
    assert torch.equal(transform(random_erasing=1.0)(batch(), LABELS)[0], erased)
    for before, after in zip(plain, erased, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        area = len(rows) * len(columns)
        assert changed.sum() == area == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 1 <= area <= 0.4 * 256
        assert len(after[:, changed].unique()) == 3 * area


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_images_and_targets_alike_and_smooths_once(smoothing: float) -> None:
    plain = transform()(batch(), LABELS)[0]
    mix = transform(mixup=0.8, label_smoothing=smoothing)
    assert mix.loss_label_smoothing == 0
    seed_all(1)
    inputs, targets = mix(batch(), LABELS)
    # Solve for the fraction from the images; the targets must follow from it.
    other = plain.flip(0)
    fraction = float(((inputs - other) * (plain - other)).sum() / (plain - other).square().sum())
    assert 0 < fraction < 1
    torch.testing.assert_close(inputs, fraction * plain + (1 - fraction) * other, atol=1e-4, rtol=0)
    one_hot = torch.eye(5)[LABELS]
    smooth = one_hot * (1 - smoothing) + smoothing / 5
    torch.testing.assert_close(targets, fraction * smooth + (1 - fraction) * smooth.flip(0), atol=1e-4, rtol=0)


def test_cutmix_pastes_a_rectangle_and_counts_its_area() -> None:
    plain = transform()(batch(), LABELS)[0]
    seed_all(2)
    inputs, targets = transform(cutmix=1.0)(batch(), LABELS)
    pasted = (inputs == plain.flip(0)).all(1) & (inputs != plain).any(1)
    assert torch.equal(pasted[0], pasted[1])
    fraction = 1 - pasted[0].sum() / 256
    assert 0 < fraction < 1
    torch.testing.assert_close(targets, fraction * torch.eye(5)[LABELS] + (1 - fraction) * torch.eye(5)[LABELS].flip(0))


def test_mixup_and_cutmix_alternate_at_random() -> None:
    plain = transform()(batch(), LABELS)[0]
    both = transform(mixup=0.8, cutmix=1.0)
    kept = 0
    for seed in range(60):
        seed_all(seed)
        inputs = both(batch(), LABELS)[0]
        kept += bool(((inputs == plain) | (inputs == plain.flip(0))).all())
    assert 15 < kept < 45


def test_the_loss_must_smooth_labels_without_mixing() -> None:
    assert transform(label_smoothing=0.1).loss_label_smoothing == 0.1
