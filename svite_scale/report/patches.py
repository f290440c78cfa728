"""The patches of evaluation images that token selectors keep."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.errors import DataError, RunError
from svite_scale.models.token_selector import TokenSelector
from svite_scale.report.html import join, tag
from svite_scale.report.section import Pictures, Runs, Section, heading
from svite_scale.saved_run import evaluation_images

DIMMED = 0.3
"""Weight of the pixels of a dropped patch, against :data:`DARK_BLUE`."""

DARK_BLUE = np.array([0.15, 0.25, 0.5], dtype=np.float32)
"""Color that dropped patches fade to. It isn't grey, so they stand out in a black and white image too."""


def named_selectors(model: nn.Module) -> list[tuple[str, TokenSelector]]:
    """Returns the token selectors in order, with their names among the blocks: ``selector<i>`` stands before block i."""
    return [(name.rpartition(".")[2], item) for name, item in model.named_modules() if isinstance(item, TokenSelector)]


def kept_patches(model: VisionTransformer, images: Tensor) -> Tensor:
    """Returns which patches of each image are left after each selector.

    Args:
        model: in evaluation mode, not wrapped by any engine.
        images: inputs of the model, ``[B, C, H, W]``.

    Returns:
        Bool ``[selectors, B, patches]``, patches in rows from the top left.
    """
    inputs: list[Tensor] = []
    selectors = [selector for _, selector in named_selectors(model)]
    hooks = [selector.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for selector in selectors]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    passed = [tokens_passed(selector, x)[:, model.num_prefix_tokens :] for selector, x in zip(selectors, inputs, strict=True)]
    return compose(passed, model.patch_embed.num_patches)


@torch.enable_grad()
def tokens_passed(selector: TokenSelector, x: Tensor) -> Tensor:
    """Returns which of the tokens ``x``, ``[B, N, D]``, pass a selector in evaluation mode; bool ``[B, N]``.

    The output holds these tokens unchanged; the others are left out or set to 0. So exactly these have a gradient.
    """
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(selector(x).sum(), x)
    return gradient.ne(0).any(dim=-1)


def compose(passed: Sequence[Tensor], num_patches: int) -> Tensor:
    """Maps the patch tokens that pass each selector to patches of the image.

    Args:
        passed: by selector, bool ``[B, N]``: which of the N patch tokens that reach it pass. N is smaller behind a selector
            that leaves tokens out.
        num_patches: of an image.

    Returns:
        Bool ``[selectors, B, num_patches]``.
    """
    kept: list[Tensor] = []
    for passing in passed:
        reaching = torch.ones(len(passing), num_patches, dtype=torch.bool)
        if passing.shape[1] < num_patches:
            reaching = kept[-1]
        # In row-major order, so each image's tokens go, in order, to those of its patches that reached the selector.
        kept.append(torch.zeros_like(reaching).masked_scatter_(reaching, passing))
    return torch.stack(kept) if kept else torch.zeros(0, 0, num_patches, dtype=torch.bool)


def dimmed(pixels: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_], grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Returns images whose dropped patches fade to dark blue.

    Args:
        pixels: ``[B, C, H, W]``, with C = 1 or 3.
        kept: ``[B, patches]``, in rows from the top left.
        grid: rows and columns of patches.

    Returns:
        RGB of 0 to 1, ``[B, H, W, 3]``.
    """
    batch, _, height, width = pixels.shape
    rows, columns = grid
    colors = np.broadcast_to(pixels.transpose(0, 2, 3, 1).astype(np.float32) / 255, (batch, height, width, 3))
    passes = kept.reshape(batch, rows, columns).repeat(height // rows, axis=1).repeat(width // columns, axis=2)
    return np.where(passes[..., None], colors, DIMMED * colors + (1 - DIMMED) * DARK_BLUE)


def picture_of_image(image: npt.NDArray[np.float32]) -> bytes:
    """Returns a WebP of an RGB image of 0 to 1, ``[H, W, 3]``; lossless if it is small."""
    content = BytesIO()
    pixels = Image.fromarray((255 * image).round().astype(np.uint8))
    pixels.save(content, "webp", quality=80, lossless=is_small(image))
    return content.getvalue()


def is_small(image: npt.NDArray[np.float32]) -> bool:
    """Returns whether an image is to be shown larger than it is, pixel by pixel."""
    return max(image.shape[:2]) <= 96


def patches(runs: Runs, num_images: int, pictures: Pictures) -> Section | None:
    """Returns evaluation images, with the patches dimmed that each token selector or an earlier one drops."""
    parts = []
    for run_number, run in enumerate(runs, start=1):
        if run.saved is None or not (selectors := named_selectors(run.model)):
            continue
        try:
            images = evaluation_images(run.saved.evaluation_config(), num_images)
        except (DataError, RunError) as error:
            pictures.notes.append(f"Kept patches are left out: {error}")
            continue
        vit = cast(VisionTransformer, run.model)
        kept = kept_patches(vit, images.inputs).numpy()
        parts += heading(runs, run)
        for (name, _), passing in zip(selectors, kept, strict=True):
            counts = f"{passing[0].sum()} of {passing.shape[1]} patches"
            overlaid = dimmed(images.pixels.numpy(), passing, vit.patch_embed.grid_size)
            figures = []
            for image, sample, label in zip(overlaid, images.samples.tolist(), images.labels.tolist(), strict=True):
                file = f"run{run_number}-{name}-sample{sample}.webp"
                alt = f"patches of sample {sample} that pass {name}"
                element = pictures.add(file, picture_of_image(image), alt, class_=None if is_small(image) else "photo")
                figures.append(tag("figure", element, tag("figcaption", f"sample {sample}, label {label}")))
            head = tag("h4", f"What block {name.removeprefix('selector')} and those after it get: {counts}")
            parts += [head, tag("div", tag("div", *figures, class_="patches"), class_="card")]
    return Section("Kept patches", join(*parts), "The token selectors drop the dimmed patches.") if parts else None
