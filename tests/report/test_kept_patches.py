"""Which patches pass: counted out by hand, through one selector and through several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor

from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.models.token_selector import ClassifierSelector, PaperSelector, TokenSelector
from svite_scale.report.patches import compose, kept_patches, named_selectors, tokens_passed

SIZES = {"depth": 3, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "image_size": 40, "num_classes": 11, "in_channels": 1}
"""25 patches."""


def vit(name: str, **tokens: Any) -> VisionTransformer:
    """With selectors where ``tokens`` says so."""
    torch.manual_seed(0)
    model = build_dense(ModelConfig(name=name, **SIZES))  # type: ignore[arg-type]
    if tokens:
        insert_token_selectors(model, **tokens)
    return model.eval()


def scores_of(selector: TokenSelector, patches: Tensor) -> Tensor:
    """The scores of patch tokens ``[B, N, D]``, by the formula of the selector's signal."""
    if isinstance(selector, PaperSelector):
        return patches @ selector.weight[0]
    assert isinstance(selector, ClassifierSelector)
    tokens = (patches - patches.mean(-1, keepdim=True)) / patches.var(-1, correction=0, keepdim=True).add(1e-5).sqrt()
    exponential = (tokens @ selector.attention.queries.T).exp()
    return (exponential / exponential.sum(dim=1, keepdim=True)).sum(dim=-1)


def watched(model: VisionTransformer) -> list[list[list[int]]]:
    """By call of a selector, those of the model's forward coming first, and by image: which of the patch tokens that reach it
    have the highest scores, ascending.
    """
    found: list[list[list[int]]] = []

    def watch(selector: TokenSelector, arguments: tuple[Tensor]) -> None:
        scores = scores_of(selector, arguments[0][:, selector.num_prefix :]).tolist()
        order = [sorted(range(len(row)), key=lambda patch, row=row: -row[patch]) for row in scores]
        found.append([sorted(patches[: selector.num_patches]) for patches in order])

    for _, selector in named_selectors(model):
        selector.register_forward_pre_hook(watch)
    return found


# With a class token, with two prefix tokens, and with registers that come before the patches.
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_kept_patches_of_later_selectors_are_among_those_of_earlier_ones(name: str) -> None:
    model = vit(name, keep=0.65, blocks=(0, 1, 2))
    chosen = watched(model)
    kept = kept_patches(model, torch.randn(6, 1, 40, 40))
    assert (kept.shape, kept.dtype) == ((3, 6, 25), torch.bool)
    assert [name for name, _ in named_selectors(model)] == ["selector0", "selector1", "selector2"]
    counts = [selector.num_patches for _, selector in named_selectors(model)]
    assert 25 > counts[0] > counts[1] > counts[2]
    assert kept.sum(dim=-1).tolist() == [[count] * 6 for count in counts]
    for image in range(6):
        after_first = chosen[0][image]
        after_second = [after_first[place] for place in chosen[1][image]]
        after_third = [after_second[place] for place in chosen[2][image]]
        found = [row.nonzero().flatten().tolist() for row in kept[:, image]]
        assert found == [after_first, after_second, after_third]
    assert len({tuple(row.tolist()) for row in kept[2]}) > 1, "images differ"


@pytest.mark.parametrize("signal", ["classifier", "paper"])
def test_kept_patches_are_chosen_of_all_patches_when_selectors_mask(signal: str) -> None:
    model = vit("vit_tiny_patch16_224", keep=18, blocks=(0, 2), mode="mask", signal=signal)
    chosen = watched(model)
    kept = kept_patches(model, torch.randn(5, 1, 40, 40))
    assert kept.sum(dim=-1).tolist() == [[17] * 5] * 2
    assert [[row.nonzero().flatten().tolist() for row in rows] for rows in kept] == chosen[:2]


def test_kept_patches_is_empty_without_selectors() -> None:
    model = vit("vit_tiny_patch16_224")
    assert named_selectors(model) == []
    assert kept_patches(model, torch.randn(2, 1, 40, 40)).shape[0] == 0


def test_kept_patches_passes_prefix_tokens_and_leaves_the_model_unchanged() -> None:
    model = vit("vit_small_patch14_reg4_dinov2", keep=15, blocks=(1,))
    ((_, selector),) = named_selectors(model)
    images = torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        before = model(images)
    kept_patches(model, images)
    assert tokens_passed(selector, torch.randn(2, 30, 24))[:, :5].all()
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert not selector._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compose_maps_tokens_to_patches_through_three_selectors() -> None:
    first = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]).bool()
    second = torch.tensor([[0, 1, 1], [1, 0, 1]]).bool()
    third = torch.tensor([[0, 1], [1, 0]]).bool()
    expected = [[[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]], [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]]
    assert compose([first, second, third], 5).int().tolist() == expected
