"""Which patches of images the token selectors let pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.models.token_selector import TokenSelector


def named_selectors(model: nn.Module) -> list[tuple[str, TokenSelector]]:
    """The token selectors by the names that they have among the blocks, ``selector<i>`` right before block i, in order."""
    return [(name.rpartition(".")[2], item) for name, item in model.named_modules() if isinstance(item, TokenSelector)]


def kept_patches(model: VisionTransformer, images: Tensor) -> Tensor:
    """What is left of each image after each selector.

    Args:
        model: set to evaluate, not wrapped by any engine.
        images: as the model takes them, ``[B, C, H, W]``.

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
    """Bool ``[B, N]``, which of the tokens ``x``, ``[B, N, D]``, a selector set to evaluate lets pass.

    Its output is made of those tokens alone, as they are, whether it leaves the others out or sets them to 0. So they are those
    that have a gradient.
    """
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(selector(x).sum(), x)
    return gradient.ne(0).any(dim=-1)


def compose(passed: Sequence[Tensor], num_patches: int) -> Tensor:
    """From patch tokens that reach each selector to patches of the image.

    Args:
        passed: by selector, bool ``[B, N]``, which of the patch tokens that reach it pass; those are the ones that passed the
            selector before, or all of them, where that one set tokens to 0 and left none out.
        num_patches: of an image.

    Returns:
        Bool ``[selectors, B, num_patches]``.
    """
    kept: list[Tensor] = []
    for passing in passed:
        reaching = torch.ones(len(passing), num_patches, dtype=torch.bool)
        if passing.shape[1] < num_patches:
            reaching = kept[-1]
        # In row-major order, so each image's tokens go to the patches of its own that reached the selector, in order.
        kept.append(torch.zeros_like(reaching).masked_scatter_(reaching, passing))
    return torch.stack(kept) if kept else torch.zeros(0, 0, num_patches, dtype=torch.bool)
