"""From a uint8 batch to the model's input: what is done on the device to whole batches."""

from __future__ import annotations

import torch
from torch import Tensor

from svite_scale.data.options import DataConfig


class DeviceTransform:
    """Normalises a batch; at training it also erases rectangles and mixes images as DeiT does.

    What is random draws from the global generators of Python, numpy and torch, which the caller seeds.

    Args:
        data: mean, std, and the augmentation.
        num_classes: width of mixed targets.
        device: where the batches are computed.
        training: False only normalises.
    """

    loss_label_smoothing: float
    """Label smoothing that the loss must still apply: 0 when the targets are mixed, for those are smoothed already."""

    def __init__(self, data: DataConfig, num_classes: int, device: torch.device, training: bool) -> None:
        # timm takes seconds to import, which writing shards need not wait for.
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        augment = data.augment
        self._device = device
        self._mean = torch.tensor(data.mean, device=device).mul(255).view(1, -1, 1, 1)
        self._std = torch.tensor(data.std, device=device).mul(255).view(1, -1, 1, 1)
        self._erase = None
        if training and augment.random_erasing > 0:
            self._erase = RandomErasing(augment.random_erasing, mode="pixel", device=device)
        self._mix = None
        if training and (augment.mixup > 0 or augment.cutmix > 0):
            self._mix = Mixup(
                augment.mixup,
                augment.cutmix,
                switch_prob=0.5,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
        self.loss_label_smoothing = augment.label_smoothing if training and self._mix is None else 0.0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Moves and transforms one micro-batch.

        Args:
            images: uint8 ``[B, C, H, W]``; B is even where mixup or cutmix is on, which mix pairs.
            labels: int64 ``[B]``.

        Returns:
            Images, float32 ``[B, C, H, W]``, and targets on the device: int64 ``[B]``, or with mixup or cutmix
            float32 ``[B, num_classes]``.
        """
        inputs = images.to(self._device, non_blocking=True)
        inputs = inputs.to(torch.float32, memory_format=torch.contiguous_format).sub_(self._mean).div_(self._std)
        targets = labels.to(self._device, non_blocking=True)
        if self._erase is not None:
            inputs = self._erase(inputs)
        if self._mix is None:
            return inputs, targets
        return self._mix(inputs, targets)
