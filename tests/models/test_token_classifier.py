"""The selector that learns by classifying: its formula, its loss, what that loss reaches, and how many tokens pass when."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svite_scale
from svite_scale.errors import OptionError, TopologyError
from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.models.token_selector import ClassifierSelector, PassingPatches, RandomSelector, selector_loss

DIM, CLASSES, PREFIX, KEPT = 8, 5, 1, 4
MODEL = ModelConfig(
    name="vit_tiny_patch16_224", num_classes=6, image_size=32, in_channels=1, patch_size=8, embed_dim=16, depth=2, num_heads=2
)
"""16 patch tokens and the class token."""


def selector_of(mode: str = "gather") -> ClassifierSelector:
    torch.manual_seed(0)
    selector = ClassifierSelector(DIM, PREFIX + KEPT, PREFIX, mode=mode, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.normal_()
    return selector


def tokens_of(batch: int = 3, num_tokens: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, num_tokens, DIM, generator=torch.Generator().manual_seed(seed))


def by_hand(selector: ClassifierSelector, sample: Tensor) -> tuple[list[float], list[float]]:
    """Returns a sample's scores and logits, one number after another."""
    state = {name: tensor.double().tolist() for name, tensor in selector.state_dict().items()}
    tokens = []
    for token in sample[PREFIX:].double().tolist():
        mean = sum(token) / DIM
        scale = math.sqrt(sum((value - mean) ** 2 for value in token) / DIM + 1e-5)
        tokens.append([(value - mean) / scale for value in token])
    scores, values = [0.0] * len(tokens), []
    for number, query in enumerate(state["attention.queries"]):
        exponential = [math.exp(sum(a * b for a, b in zip(query, token, strict=True))) for token in tokens]
        attention = [value / sum(exponential) for value in exponential]
        scores = [score + each / 4 for score, each in zip(scores, attention, strict=True)]
        pooled = [sum(each * token[i] for each, token in zip(attention, tokens, strict=True)) for i in range(DIM)]
        rows = state["classifier.projection"][16 * number : 16 * (number + 1)]
        values += [sum(a * b for a, b in zip(row, pooled, strict=True)) for row in rows]
    rows = zip(state["classifier.weight"], state["classifier.bias"], strict=True)
    return scores, [sum(a * b for a, b in zip(row, values, strict=True)) + bias for row, bias in rows]


def test_scores_and_logits_are_the_formula_by_hand() -> None:
    selector, x = selector_of(), tokens_of()
    selector.train()(x)
    logits = selector.take_logits()
    scores = selector.scores(x[:, PREFIX:])
    for sample in range(len(x)):
        expected = by_hand(selector, x[sample])
        assert scores[sample].tolist() == pytest.approx(expected[0], rel=1e-4)
        assert logits[sample].tolist() == pytest.approx(expected[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_tokens_of_highest_score_pass_unchanged_and_in_order(training: bool) -> None:
    selector, x = selector_of().train(training), tokens_of(16)
    y = selector(x)
    for sample in range(16):
        scores = by_hand(selector, x[sample])[0]
        best = sorted(sorted(range(11), key=lambda patch, scores=scores: -scores[patch])[:KEPT])
        assert torch.equal(y[sample], x[sample, [0, *(1 + patch for patch in best)]])


def test_the_other_tokens_are_zero_in_mode_mask() -> None:
    gather, mask, x = selector_of(), selector_of("mask"), tokens_of()
    passed = gather.train()(x)
    masked = mask.train()(x)
    assert masked.shape == x.shape
    for sample in range(len(x)):
        alive = masked[sample].abs().sum(dim=-1) > 0
        assert torch.equal(masked[sample, alive], passed[sample])
        assert int(alive.sum()) == PREFIX + KEPT


def test_a_sample_is_chosen_for_alone_and_ties_go_to_the_lower_position() -> None:
    selector, x = selector_of().eval(), tokens_of(33, 50)
    y = selector(x)
    for size in (1, 2, 7):
        assert torch.equal(torch.cat([selector(part) for part in x.split(size)]), y)
    equal = torch.ones(1, 40, DIM) * torch.arange(DIM)
    equal[0, :, 0] = torch.arange(40) * 1e-9  # which no score sees
    assert selector(equal)[0, :, 0].tolist() == pytest.approx([1e-9 * i for i in range(5)])


def test_scores_are_fp32_for_bf16_tokens() -> None:
    selector, x = selector_of().eval().bfloat16(), tokens_of().bfloat16()
    expected = by_hand(selector, x[0])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = selector.scores(x[:, PREFIX:])
    assert scores.dtype == torch.float32
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_the_model_has_the_gradient_of_its_own_loss_alone() -> None:
    """And the selectors that of theirs alone."""
    torch.manual_seed(0)
    model = build_dense(MODEL).train()
    insert_token_selectors(model, keep=0.5, blocks=(0, 1))
    images, labels = torch.randn(4, 1, 32, 32), torch.arange(4)
    gradients = []
    for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        model.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        (weights[0] * loss + weights[1] * selector_loss(model, labels)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        own = gradients[2 if "selector" in name else 1][name]
        assert torch.equal(gradient, own), name
        assert not gradients[1 if "selector" in name else 2][name].any(), name
        assert gradient.any(), name


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_selector_loss_is_the_sum_of_cross_entropies(label_smoothing: float, soft: bool) -> None:
    model = build_dense(MODEL).train()
    first, second = insert_token_selectors(model, keep=0.5, blocks=(0, 1))
    labels = torch.tensor([1, 5, 0])
    targets = torch.rand(3, 6).softmax(dim=-1) if soft else labels
    model(torch.randn(3, 1, 32, 32))
    expected = 0.0
    for selector in (first, second):
        logits = selector.logits.double().log_softmax(dim=-1)  # type: ignore[union-attr, operator]
        fractions = targets.double() if soft else F.one_hot(labels, 6).double()
        smooth = (1 - label_smoothing) * fractions + label_smoothing / 6
        expected -= float((smooth * logits).sum(dim=-1).mean().detach())
    found = selector_loss(model, targets, label_smoothing=label_smoothing)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert first.logits is second.logits is None


def test_selector_loss_is_zero_for_a_model_without_a_classifier() -> None:
    model = build_dense(MODEL)
    insert_token_selectors(model, keep=0.5, signal="paper")
    assert float(selector_loss(model, torch.arange(4))) == 0.0


def test_selector_loss_is_refused_without_a_forward_in_training() -> None:
    model = build_dense(MODEL)
    insert_token_selectors(model, keep=0.5)
    images, labels = torch.randn(2, 1, 32, 32), torch.arange(2)
    model.eval()(images)
    for training in (False, True):
        with torch.set_grad_enabled(not training):
            model.train(training)(images)
        with pytest.raises(TopologyError, match="no logits for their loss; call selector_loss once after each forward"):
            selector_loss(model, labels)
    model(images)
    selector_loss(model, labels)
    with pytest.raises(TopologyError, match="no logits"):
        selector_loss(model, labels)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_the_selectors_loss_is_an_error(checkpointing: bool) -> None:
    """Also where activation checkpointing computes the logits a second time, after they were taken."""
    model = build_dense(MODEL).train()
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    (selector,) = insert_token_selectors(model, keep=0.5)
    topology = svite_scale.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9)
    images, labels = torch.randn(2, 1, 32, 32), torch.arange(2)
    model(images)
    for _ in range(2):
        (F.cross_entropy(model(images), labels) + selector_loss(model, labels)).backward()
        topology.step()
        assert selector.logits is None, "no memory is held between steps"
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(TopologyError, match=r"didn't learn in this step.*add svite_scale\.selector_loss\(model, targets\)"):
        topology.step()
    topology.step()


def test_a_model_can_be_copied_after_a_forward_in_training() -> None:
    model = build_dense(MODEL).train()
    insert_token_selectors(model, keep=0.5)
    images = torch.randn(2, 1, 32, 32)
    model(images)
    copied = copy.deepcopy(model)
    assert torch.equal(copied.eval()(images), model.eval()(images))
    assert svite_scale.to_dense(model).blocks.selector0.logits is None  # type: ignore[union-attr]


@pytest.mark.parametrize("signal", ["classifier", "random"])
def test_tokens_are_dropped_in_training_only_until_they_all_pass(signal: str) -> None:
    torch.manual_seed(0)
    model = build_dense(MODEL)
    images = torch.randn(4, 1, 32, 32)
    expected = model.eval()(images)
    (selector,) = insert_token_selectors(model, training_keep=0.25, training_keep_until=0.8, signal=signal)
    assert torch.equal(model.eval()(images), expected), "in evaluation all tokens pass"
    seen: list[tuple[int, ...]] = []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))  # type: ignore[union-attr, operator]
    for progress in (0.0, 0.5, 0.799, 0.8, 1.0):
        selector.anneal(progress)
        model.train()(images)
    assert [shape[1] for shape in seen] == [5, 5, 5, 17, 17]
    model.train()
    selector.anneal(1.0)
    assert torch.equal(model(images), expected), "without dropout, training ends on the model of evaluation"


def test_a_random_selector_draws_for_each_sample_alike_for_each_patch() -> None:
    selector = RandomSelector(1 + 2, 1)
    selector.schedule(PassingPatches(6, 2, until=1.0))
    x = torch.arange(7.0).view(1, 7, 1).expand(30_000, -1, -1)
    torch.manual_seed(0)
    passed = selector.train()(x)[..., 0]
    assert passed[:, 0].eq(0).all()
    assert passed.diff(dim=1).gt(0).all(), "in order"
    counts = np.bincount(passed[:, 1:].flatten().int().numpy(), minlength=7)[1:]
    assert np.abs(counts / 10_000 - 1).max() < 0.04, "four standard deviations of a binomial are 0.033"


@pytest.mark.parametrize("kept", [1, 14, 25, 48])
@pytest.mark.parametrize("warmup", [0.3, 1.0])
def test_the_passing_patches_fall_by_a_cosine_in_few_levels(kept: int, warmup: float) -> None:
    passing = PassingPatches(49, kept, warmup)
    counts = [passing.at(step / 1000) for step in range(1001)]
    assert counts[0] == 49
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) <= 8
    assert counts[int(1000 * warmup) :] == [kept] * (1001 - int(1000 * warmup))
    for step in range(int(1000 * warmup)):
        # A level holds for a seventh of the warm-up, from where the cosine has it.
        ideal, later = (
            kept + (49 - kept) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
            for progress in (step / 1000 / warmup - 1 / 7, step / 1000 / warmup)
        )
        assert later - 0.5 - 1e-9 <= counts[step] <= ideal + 0.5 + 1e-9


def test_no_warmup_keeps_the_final_number_from_the_start() -> None:
    assert {PassingPatches(49, 24).at(step / 10) for step in range(11)} == {24}


def test_several_selectors_fall_from_all_tokens_each_to_its_own_number() -> None:
    model = build_dense(MODEL).train()
    selectors = insert_token_selectors(model, keep=0.5, blocks=(0, 1), keep_warmup=0.5)
    seen = []
    for step in range(11):
        for selector in selectors:
            selector.anneal(step / 10)
        model(torch.randn(2, 1, 32, 32))
        selector_loss(model, torch.arange(2))
        seen.append([selector.passing for selector in selectors])
    assert seen[0] == [16, 16]
    assert all(first >= second for first, second in seen)
    assert seen[5:] == [[8, 4]] * 6
    assert [selector.num_patches for selector in selectors] == [8, 4]
    model.eval()
    assert selectors[0](torch.randn(2, 17, 16)).shape == (2, 9, 16), "evaluation has the final number"


def test_a_progress_outside_training_is_refused() -> None:
    with pytest.raises(OptionError, match=r"progress = 1\.5: is outside 0 to 1"):
        selector_of().anneal(1.5)


def test_it_learns_to_keep_the_patches_that_tell_the_class() -> None:
    """Each image has its class in one patch, at a random place, and noise of the same size in the 15 others."""
    torch.manual_seed(0)
    model = build_dense(MODEL)
    (selector,) = insert_token_selectors(model, keep=5)
    patterns = torch.randn(6, 8, 8)
    optimizer = torch.optim.AdamW(svite_scale.parameter_groups(model, 0.01), lr=3e-3)

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        labels, places = torch.randint(6, (size,)), torch.randint(16, (size,))
        patches = torch.randn(size, 16, 8, 8)
        patches[torch.arange(size), places] = 2 * patterns[labels]
        images = patches.view(size, 4, 4, 8, 8).transpose(2, 3).reshape(size, 1, 32, 32)
        return images, labels, places

    def kept_fraction() -> float:
        images, _, places = batch(500)
        with torch.no_grad():
            tokens = model._pos_embed(model.patch_embed(images))[:, 1:]  # type: ignore[operator]
            best = selector.scores(tokens).topk(4).indices
        return float((best == places.unsqueeze(1)).any(dim=1).float().mean())

    model.eval()
    before = kept_fraction()
    model.train()
    for _ in range(120):
        images, labels, _ = batch(64)
        (nn.functional.cross_entropy(model(images), labels) + selector_loss(model, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert before < 0.6
    assert kept_fraction() > 0.95
