"""Images become uint8 tensors of the right size, and each recipe transforms them as documented."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Resize

from svite_scale.data.options import AugmentConfig, DataConfig
from svite_scale.data.randomness import restored_random_state, seed_sample
from svite_scale.data.transforms import augment_ops, crop_ends, eval_transform, thin_out, to_pil, train_transform
from svite_scale.errors import ConfigError


def noise(width: int, height: int, mode: str = "RGB") -> torch.Tensor:
    channels = {"RGB": 3, "L": 1}[mode]
    array = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators within the block."""
    with restored_random_state():
        seed_sample(seed)
        yield


def config(recipe: str, channels: int = 3, **augment: object) -> DataConfig:
    return DataConfig(
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        augment=AugmentConfig(recipe=recipe, **augment),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("recipe", ["none", "affine", "deit"])
def test_shape_dtype_and_seeded_randomness(recipe: str, mode: str) -> None:
    transform = train_transform(config(recipe, len(mode)), 24)
    image = noise(40, 32, mode)

    def run(seed: int) -> torch.Tensor:
        with seeded(seed):
            return transform(image)

    outputs = [run(seed) for seed in range(20)]
    assert {(output.dtype, tuple(output.shape)) for output in outputs} == {(torch.uint8, (len(mode), 24, 24))}
    assert all(torch.equal(run(seed), output) for seed, output in enumerate(outputs))
    distinct = len({output.numpy().tobytes() for output in outputs})
    assert distinct == (1 if recipe == "none" else 20)


def test_no_recipe_keeps_pixels_of_the_right_size() -> None:
    assert torch.equal(train_transform(config("none"), 24)(noise(24, 24)), noise(24, 24))


def test_affine_is_light_and_fills_with_black() -> None:
    canvas = np.zeros((28, 28), dtype=np.uint8)
    canvas[10:18, 10:18] = 255
    image = torch.from_numpy(canvas)[None]
    transform = train_transform(config("affine", 1), 28)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    shifts = []
    for seed in range(100):
        with seeded(seed):
            output = transform(image)[0].double()
        assert 0.8**2 * 64 < (output / 255).sum() < 1.15**2 * 64
        assert output[0].sum() == 0
        shifts.append([float((output * axis).sum() / output.sum()) - 13.5 for axis in (rows, columns)])
    largest = np.abs(shifts).max(axis=0)
    assert (largest > 0.9).all()
    assert (largest < 1.5).all()  # a twenty-fifth of 28 px, which is one whole pixel, and rounding


def smooth(width: int, height: int, mode: str) -> torch.Tensor:
    """An image with similar neighbours, like a photograph and unlike noise."""
    coarse = torch.rand(1, len(mode), height // 8, width // 8, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].round().to(torch.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (120, 300), (900, 80)])
def test_crops_are_those_of_timm_and_pillow(width: int, height: int, mode: str) -> None:
    """The boxes are the same, the kernel differs: half a grey level of mean difference, from rounding."""
    image = smooth(width, height, mode)
    ours = train_transform(config("deit", len(mode), auto_augment=""), 64)
    theirs = create_transform(
        64, is_training=True, color_jitter=None, auto_augment=None, interpolation="bicubic", use_prefetcher=True
    )
    for seed in range(12):
        with seeded(seed):
            found = ours(image)
        with seeded(seed):
            expected = theirs(to_pil(image))
        difference = (found.int() - expected.int()).abs().double()
        assert difference.mean() < 0.5
        assert difference.max() <= 12


def test_evaluation_takes_the_centre_of_the_resized_image() -> None:
    image = noise(300, 400)
    expected = to_pil(image).resize((256, 341), Image.Resampling.BICUBIC).crop((16, 58, 240, 282))
    output = eval_transform(DataConfig(eval_crop=0.875), 224)(image)
    assert output.dtype == torch.uint8
    difference = output.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()
    assert difference.abs().max() == 0


@pytest.mark.parametrize("image_size", [28, 160, 224, 384])
@pytest.mark.parametrize("eval_crop", [0.875, 0.9, 0.95, 1.0])
def test_evaluation_resizes_as_timm_does(image_size: int, eval_crop: float) -> None:
    ours = eval_transform(DataConfig(eval_crop=eval_crop), image_size)
    theirs = create_transform(image_size, is_training=False, interpolation="bicubic", crop_pct=eval_crop)
    sizes = [step.size for transform in (ours, theirs) for step in transform.transforms if isinstance(step, Resize)]  # type: ignore[attr-defined]
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


def test_evaluation_without_crop_keeps_pixels_of_the_right_size() -> None:
    image = noise(28, 28, "L")
    assert torch.equal(eval_transform(DataConfig(eval_crop=1.0), 28)(image), image)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m0", "original-mstd0.5", "v0", "augmix-m5", "rand-m9-t3aw"])
def test_posterize_keeps_a_bit_at_every_magnitude(policy: str) -> None:
    transform = train_transform(config("deit", auto_augment=policy), 24)
    posterize = [op for op in augment_ops(transform.transforms) if op.name.startswith("Posterize")]  # type: ignore[attr-defined]
    assert posterize
    image = to_pil(noise(24, 24))
    for op in posterize:
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in (0, 5, 9, 10):
            op(image)


def test_augmentation_works_where_timm_alone_fails() -> None:
    """timm's own noise takes the magnitude to its maximum, where Pillow would raise without the clamp."""
    transform = train_transform(config("deit", auto_augment="rand-m10-n15-mstd0.5-inc1-p1.0"), 24)
    for seed in range(20):
        with seeded(seed):
            assert transform(noise(24, 24)).shape == (3, 24, 24)


def test_an_empty_policy_only_crops_and_flips() -> None:
    transform = train_transform(config("deit", auto_augment=""), 24)
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 40)
    for seed in range(5):
        random.seed(seed)
        assert torch.equal(transform(image)[:, 0, 0], torch.tensor([200, 100, 50], dtype=torch.uint8))


@pytest.mark.parametrize("policy", ["random", "rand-q3", "rand-mx9", "original-m3"])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.augment.auto_augment = '{policy}'"):
        train_transform(config("deit", auto_augment=policy), 24)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("recipe", ["eval", "none", "affine", "deit"])
def test_a_thin_image_costs_no_more_than_others(monkeypatch: pytest.MonkeyPatch, recipe: str, transpose: bool) -> None:
    """Resizing all of it by its short side would take gigabytes. Only some of its pixels are used, here of one colour."""
    resized: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        resized.append(max(size[0] * size[1], size[0] * self.height))
        return resize(self, size, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", counted)
    image = torch.tensor([9, 80, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 1_000_000)
    image = image.transpose(1, 2) if transpose else image
    trains = recipe != "eval"
    transform = train_transform(config(recipe, auto_augment=""), 224) if trains else eval_transform(DataConfig(), 224)
    with seeded(0):
        found = transform(image)
    assert found.shape == (3, 224, 224)
    assert found[:, 112, 112].tolist() == [9, 80, 200]
    assert max(resized, default=0) <= 224 * 2**16


def test_evaluation_of_a_thin_image_takes_its_centre() -> None:
    """The result equals that of resizing the whole image, which is small enough here."""
    image = smooth(8 * 700, 8, "RGB")
    whole = to_pil(image).resize((256 * 700, 256), Image.Resampling.BICUBIC)
    left = round((whole.width - 224) / 2)
    expected = torch.from_numpy(np.array(whole.crop((left, 16, left + 224, 240)))).permute(2, 0, 1)
    assert (eval_transform(DataConfig(), 224)(image).int() - expected.int()).abs().max() <= 1


def test_ordinary_images_are_not_cropped_before_resizing() -> None:
    """Up to the largest side of a JPEG, and to 64 times as long as wide."""
    for height, width in ((1, 64), (64, 1), (300, 500)):
        assert crop_ends(noise(width, height)).shape == (3, height, width)
    for height, width in ((1, 65535), (65535, 1)):
        assert thin_out(torch.zeros(3, height, width)).shape == (3, height, width)
    assert thin_out(torch.zeros(3, 2, 2**16 + 1)).shape == (3, 2, 2**15 + 1)
