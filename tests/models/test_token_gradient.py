"""The straight-through gradient of the paper's selector: against a formula written by hand in float64, against finite
differences, and against the formula of the reference's code.

The loss is linear in the tokens, sum over patch tokens i of <a_i, y_i>. With c_i = <a_i, x_i> and p the softmax of
(log-softmax of the scores + noise) / T, the gradient must be that of the sum of c_i p_i: in mode gather over the tokens i that
pass, the choice of i held; in mode mask over all, because a dropped token is there, as 0, and has a gradient too.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from svite_scale.models.token_selector import PaperSelector

BATCH, PREFIX, PATCHES, KEPT, DIM = 3, 2, 7, 4, 5
Array = NDArray[np.float64]


def selector_of(mode: str, temperature: float, generator: torch.Generator | None = None) -> PaperSelector:
    torch.manual_seed(0)
    selector = PaperSelector(DIM, PREFIX + KEPT, PREFIX, mode=mode, temperature=temperature, generator=generator).double()
    selector.weight.detach().mul_(50)
    return selector.train()


def problem() -> tuple[Tensor, Tensor]:
    """Tokens and what each is multiplied by in the loss, float64."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, PREFIX + PATCHES, DIM)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def noise_of(seed: int) -> Array:
    """The noise that a selector draws from a generator of this seed: minus the log of exponentials."""
    exponential = torch.empty(BATCH, PATCHES, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    return np.asarray([[-math.log(value) for value in row] for row in exponential.tolist()])


def perturbed(weight: Array, patches: Array, noise: Array) -> Array:
    scores = patches @ weight
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)) + noise


def softmax(values: Array) -> Array:
    exponential = np.exp(values - values.max())
    return exponential / exponential.sum()


def loss_of(selector: PaperSelector, x: Tensor, factors: Tensor) -> Tensor:
    """The linear loss."""
    y = selector(x)
    if selector.mode == "mask":
        return (y * factors)[:, PREFIX:].sum()
    loss = torch.zeros((), dtype=torch.float64)
    for sample in range(BATCH):
        passing = [index for token in y[sample] for index in range(x.shape[1]) if torch.equal(token, x[sample, index])]
        loss = loss + (y[sample] * factors[sample, passing])[PREFIX:].sum()
    return loss


@pytest.mark.parametrize("mode", ["gather", "mask"])
@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1])
def test_gradient_is_the_hand_written_formula(mode: str, temperature: float) -> None:
    x, factors = problem()
    x.requires_grad_()
    selector = selector_of(mode, temperature, torch.Generator().manual_seed(5))
    loss_of(selector, x, factors).backward()

    weight = selector.weight.detach().numpy()[0]
    tokens, a = x.detach().numpy(), factors.numpy()
    noisy = perturbed(weight, tokens[:, PREFIX:], noise_of(5))
    weight_gradient, x_gradient = np.zeros(DIM), np.zeros_like(tokens)
    for sample in range(BATCH):
        passing = sorted(range(PATCHES), key=lambda i: -noisy[sample, i])[:KEPT]
        p = softmax(noisy[sample] / temperature)
        for j in range(PATCHES):
            score_gradient = 0.0
            for i in passing if mode == "gather" else range(PATCHES):
                c = float(a[sample, PREFIX + i] @ tokens[sample, PREFIX + i])
                score_gradient += c * p[i] * ((i == j) - p[j]) / temperature
            weight_gradient += score_gradient * tokens[sample, PREFIX + j]
            x_gradient[sample, PREFIX + j] += score_gradient * weight
            if j in passing:
                x_gradient[sample, PREFIX + j] += a[sample, PREFIX + j]
    assert selector.weight.grad is not None
    assert x.grad is not None
    np.testing.assert_allclose(selector.weight.grad.numpy()[0], weight_gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), x_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["gather", "mask"])
@pytest.mark.parametrize("temperature", [5.0, 0.5])
def test_mean_gradient_over_noise_is_the_finite_difference_of_the_relaxed_loss(mode: str, temperature: float) -> None:
    """Over many draws, with common noise on both sides of the difference and the choice held at each draw."""
    x, factors = problem()
    generator = torch.Generator()
    selector = selector_of(mode, temperature, generator)
    weight, a = selector.weight.detach().numpy()[0].copy(), factors.numpy()
    patches, values = x[:, PREFIX:].numpy(), (a * x.numpy()).sum(axis=-1)[:, PREFIX:]
    draws, step = 400, 1e-5
    noises = [noise_of(seed) for seed in range(draws)]
    count = KEPT if mode == "gather" else PATCHES
    chosen = [np.argsort(-perturbed(weight, patches, noise), axis=-1)[:, :count] for noise in noises]

    def relaxed(at: Array) -> float:
        total = 0.0
        for noise, passing in zip(noises, chosen, strict=True):
            noisy = perturbed(at, patches, noise) / temperature
            for sample in range(BATCH):
                total += float((softmax(noisy[sample]) * values[sample])[passing[sample]].sum())
        return total / draws

    mean = np.zeros(DIM)
    for seed in range(draws):
        generator.manual_seed(seed)
        (gradient,) = torch.autograd.grad(loss_of(selector, x, factors), selector.weight)
        mean += gradient.numpy()[0] / draws
    differences = [(relaxed(weight + step * unit) - relaxed(weight - step * unit)) / (2 * step) for unit in np.eye(DIM)]
    assert np.abs(mean).max() > 1e-2
    np.testing.assert_allclose(mean, differences, rtol=1e-6, atol=1e-8)


def reference_mask(scores: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """What the paper's code multiplies patch tokens by: hard - soft.detach() + soft, with Gumbel noise."""
    soft = ((scores.log_softmax(dim=-1) + noise) / temperature).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.topk(KEPT, dim=-1).indices, 1.0)
    return hard - soft.detach() + soft


@pytest.mark.parametrize("temperature", [10.0, 0.5])
def test_mask_mode_has_the_gradient_of_the_reference_behind_a_layer_norm(temperature: float) -> None:
    """A dropped token is 0, and its gradient comes back through the LayerNorm's epsilon, a thousand times larger."""
    x, factors = problem()
    selector = selector_of("mask", temperature, torch.Generator().manual_seed(5))
    weight = selector.weight.detach().clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    mask = reference_mask(theirs[:, PREFIX:] @ weight[0], torch.from_numpy(noise_of(5)), temperature)
    masked = torch.cat([theirs[:, :PREFIX], theirs[:, PREFIX:] * mask.unsqueeze(-1)], dim=1)
    x.requires_grad_()
    for tokens in (selector(x), masked):
        (F.layer_norm(tokens, (DIM,), eps=1e-6) * factors).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 1
    torch.testing.assert_close(selector.weight.grad, weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_bf16_tokens_get_nearly_the_fp32_gradient_and_pass_unchanged() -> None:
    torch.manual_seed(3)
    x, a = (torch.randn(4, 9, 64).bfloat16() for _ in range(2))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        selector = PaperSelector(64, 6, 1, mode="mask", temperature=1.0)
        torch.manual_seed(1)
        y = selector(x.to(dtype))
        assert y.dtype == dtype
        kept = y.abs().sum(dim=-1) > 0
        assert torch.equal(y[kept].bfloat16(), x[kept])
        (y * a.to(dtype)).float().sum().backward()
        assert selector.weight.grad is not None
        gradients.append(selector.weight.grad)
    assert float((gradients[0] - gradients[1]).norm()) < 0.02 * float(gradients[0].norm())
