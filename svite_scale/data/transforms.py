"""Transforms of images: of one sample on the CPU, from uint8 to uint8, and of a batch on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, RandomAffine, Resize

from svite_scale.data.options import DataConfig
from svite_scale.errors import ConfigError

Transform = Callable[[Tensor], Tensor]
"""A function from uint8 ``[C, any height, any width]``, as ``decode`` returns it, to uint8 ``[C, size, size]``."""
LONGEST_SIDE = 1 << 16
"""Longest side, more than a JPEG can have, that is resized from every pixel; longer sides from every second, third, ..."""
THINNEST = 64
"""Largest ratio of the sides of an image that is resized by its short side."""


def train_transform(data: DataConfig, image_size: int) -> Transform:
    """Returns the training transform that ``data.augment.recipe`` names.

    ``none`` resizes any shape to the size. ``affine`` then rotates, moves and scales a little, and fills with black. ``deit``
    crops and resizes at random, flips, and applies timm's ``auto_augment`` policy (none if it is empty).

    Raises:
        ConfigError: timm doesn't know the policy.
    """
    augment = data.augment
    if augment.recipe == "deit":
        return deit_transform(augment.auto_augment, data.mean, image_size)
    resize = Resize((image_size, image_size), InterpolationMode.BICUBIC)
    if augment.recipe == "none":
        return Compose([thin_out, to_pil, resize, PILToTensor()])
    affine = RandomAffine(degrees=5, translate=(0.04, 0.04), scale=(0.95, 1.05), interpolation=InterpolationMode.BILINEAR)
    return Compose([thin_out, to_pil, resize, affine, PILToTensor()])


def eval_transform(data: DataConfig, image_size: int) -> Transform:
    """Returns the evaluation transform.

    It resizes the short side to ``image_size / eval_crop``, rounded down as timm does, and crops the centre. An image that
    already has the size keeps its pixels if ``eval_crop`` is 1.0.
    """
    resize = Resize(math.floor(image_size / data.eval_crop), InterpolationMode.BICUBIC)
    return Compose([crop_ends, to_pil, resize, CenterCrop(image_size), PILToTensor()])


def deit_transform(auto_augment: str, mean: tuple[float, ...], image_size: int) -> Transform:
    """Returns DeiT's training transform, made by timm."""
    from timm.data import create_transform  # takes seconds to import, which other uses of this module needn't wait for

    try:
        transform = create_transform(
            image_size,
            is_training=True,
            color_jitter=None,
            auto_augment=auto_augment or None,
            interpolation="bicubic",
            mean=mean,
            use_prefetcher=True,  # leaves the image as uint8
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            "data.augment.auto_augment", auto_augment, f"timm can't read it ({error})", "use for example rand-m9-mstd0.5-inc1"
        ) from error
    transform.transforms[0] = CropAndResize(transform.transforms[0])
    return keep_a_bit(transform)


def keep_a_bit(transform: Compose) -> Compose:
    """Changes a transform of timm so that posterizing keeps at least one bit per channel, and returns it.

    timm asks for 0 bits at the highest magnitudes, and Pillow 13 refuses to keep less than 1.
    """
    for op in augment_ops(transform.transforms):
        if op.name.startswith("Posterize"):
            op.level_fn = partial(at_least_one_bit, op.level_fn)
    return transform


def thin_out(pixels: Tensor) -> Tensor:
    """Drops rows or columns of an image that has more than ``LONGEST_SIDE``, because resizing takes memory for each."""
    rows, columns = (-(-side // LONGEST_SIDE) for side in pixels.shape[1:])
    return pixels[:, ::rows, ::columns]


def crop_ends(pixels: Tensor) -> Tensor:
    """Returns the middle of an image that is longer than ``THINNEST`` times its width; evaluation sees only its centre.

    Resized as a whole by its short side, 2 x 100,000 pixels would become 256 x 12,800,000.
    """
    longest = THINNEST * min(pixels.shape[1:])
    top, left = (max(0, side - longest) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + longest, left : left + longest]


def to_pil(pixels: Tensor) -> Image.Image:
    """Converts uint8 ``[C, H, W]`` to a PIL image, grey or RGB."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


class CropAndResize:
    """timm's random crop, resized by torch's kernel for uint8, which is a few times faster than Pillow's.

    The mean difference of a pixel is below half a grey level.

    Args:
        crop: timm's ``RandomResizedCropAndInterpolation``, which draws the boxes.
    """

    def __init__(self, crop: Any) -> None:
        self._crop = crop

    def __call__(self, pixels: Tensor) -> Image.Image:
        """Crops uint8 ``[C, H, W]``, and returns a PIL image."""
        top, left, height, width = self._crop.get_params(pixels, self._crop.scale, self._crop.ratio)
        region = pixels[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        return to_pil(F.interpolate(region, self._crop.size, mode="bicubic", antialias=True)[0])


def augment_ops(steps: Iterable[Any]) -> Iterable[Any]:
    """Yields timm's ``AugmentOp`` objects in ``steps``: RandAugment and AugMix hold a list, AutoAugment a list of lists."""
    for step in steps:
        yield from getattr(step, "ops", [])
        for sub_policy in getattr(step, "policy", []):
            yield from sub_policy


def at_least_one_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    return (max(1, level_fn(level, hparams)[0]),)


class DeviceTransform:
    """Normalises a batch; for training it also erases rectangles and mixes images as DeiT does.

    It draws from the global generators of Python, numpy and torch, which the caller seeds.

    Args:
        data: mean, std, and the augmentation.
        num_classes: width of mixed targets.
        device: of the model.
        training: False only normalises.
    """

    loss_label_smoothing: float
    """Label smoothing that the loss must apply; 0 if targets are mixed, because mixing smooths them."""

    def __init__(self, data: DataConfig, num_classes: int, device: torch.device, training: bool) -> None:
        # timm takes seconds to import, which other uses of this module needn't wait for.
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
            images: uint8 ``[B, C, H, W]``; B must be even for mixup and cutmix, which mix pairs.
            labels: int64 ``[B]``.

        Returns:
            Images, float32 ``[B, C, H, W]``, and targets on the device: int64 ``[B]``, or float32 ``[B, num_classes]`` with
            mixup or cutmix.
        """
        inputs = images.to(self._device, non_blocking=True)
        inputs = inputs.to(torch.float32, memory_format=torch.contiguous_format).sub_(self._mean).div_(self._std)
        targets = labels.to(self._device, non_blocking=True)
        if self._erase is not None:
            inputs = self._erase(inputs)
        if self._mix is None:
            return inputs, targets
        return self._mix(inputs, targets)
