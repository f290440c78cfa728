"""What a token selector lets pass: how many, in which order, which ones, and by what chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from svite_scale.errors import OptionError
from svite_scale.models.options import TokensConfig
from svite_scale.models.token_insertion import kept_tokens
from svite_scale.models.token_selector import PaperSelector


def numbered(batch: int, num_tokens: int, dim: int = 8, seed: int = 0) -> Tensor:
    """Random tokens whose last feature is their position."""
    x = torch.randn(batch, num_tokens, dim, generator=torch.Generator().manual_seed(seed))
    x[..., -1] = torch.arange(num_tokens)
    return x


def positions(y: Tensor) -> list[list[int]]:
    return y[..., -1].round().int().tolist()


def selector_of(num_tokens: int, num_prefix: int, *, mode: str = "gather", seed: int = 0) -> PaperSelector:
    """One for tokens of 8 features, that doesn't look at the last of them."""
    torch.manual_seed(seed)
    selector = PaperSelector(8, num_tokens, num_prefix, mode=mode)
    selector.weight.detach().mul_(50)[:, -1] = 0
    return selector


def scores_by_hand(selector: PaperSelector, x: Tensor) -> list[list[float]]:
    weight = selector.weight.flatten().tolist()
    return [[sum(a * b for a, b in zip(token, weight, strict=True)) for token in sample] for sample in x.tolist()]


@pytest.mark.parametrize(("fraction", "kept"), [(0.95, 187), (0.9, 177), (0.7, 138), (0.5, 99), (1.0, 197)])
def test_fractions_of_197_tokens_are_the_papers_counts(fraction: float, kept: int) -> None:
    assert kept_tokens(TokensConfig(keep=fraction), 197, 1) == kept


@pytest.mark.parametrize("keep", [2.0, 99.0, 197.0])
def test_above_one_keep_is_a_count(keep: float) -> None:
    assert kept_tokens(TokensConfig(keep=keep), 197, 1) == keep


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 25), (0.3, 15), (0.001, 1), (0.99, 49)])
def test_training_keep_is_a_fraction_of_the_patch_tokens(fraction: float, kept: int) -> None:
    assert kept_tokens(TokensConfig(training_keep=fraction), 51, 2) == 2 + kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("kept", [6, 9, 12])
def test_exactly_so_many_pass_in_their_order_the_prefix_always(training: bool, num_prefix: int, kept: int) -> None:
    selector = selector_of(kept, num_prefix).train(training)
    x = numbered(16, 12)
    y = selector(x)
    assert y.shape == (16, kept, 8)
    for sample, passed in enumerate(positions(y)):
        assert passed == sorted(set(passed))
        assert passed[:num_prefix] == list(range(num_prefix))
        assert torch.equal(y[sample], x[sample, passed]), "they pass unchanged"
    if kept < 12:
        assert len({tuple(passed) for passed in positions(y)}) > 4, "each sample has its own"


def test_in_evaluation_the_highest_scores_pass() -> None:
    selector, x = selector_of(5, 1).eval(), numbered(16, 12)
    for passed, scores in zip(positions(selector(x)), scores_by_hand(selector, x), strict=True):
        best = sorted(range(1, 12), key=lambda position: -scores[position])[:4]
        assert passed == [0, *sorted(best)]


def test_ties_go_to_the_lower_position() -> None:
    selector = selector_of(4, 1).eval()
    x = numbered(1, 40)
    x[..., :-1] = 1.0
    assert positions(selector(x)) == [[0, 1, 2, 3]]
    x[0, 30, :-1] = selector.weight[0, :-1].detach() * 100
    assert positions(selector(x)) == [[0, 1, 2, 30]]


def test_evaluation_draws_nothing_and_a_sample_is_chosen_for_alone() -> None:
    selector, x = selector_of(20, 1).eval(), numbered(33, 50)
    state = torch.get_rng_state()
    y = selector(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(selector(x), y)
    for size in (1, 2, 7):
        assert torch.equal(torch.cat([selector(part) for part in x.split(size)]), y)
    order = torch.randperm(33)
    assert torch.equal(selector(x[order]), y[order])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_mask_mode_keeps_what_gather_mode_keeps_and_zeroes_the_rest(training: bool, num_prefix: int) -> None:
    gather, mask = (selector_of(7, num_prefix, mode=mode).train(training) for mode in ("gather", "mask"))
    x = numbered(16, 12)
    torch.manual_seed(1)
    gathered = gather(x)
    torch.manual_seed(1)
    masked = mask(x)
    expected = torch.zeros_like(x)
    for sample, passed in enumerate(positions(gathered)):
        expected[sample, passed] = x[sample, passed]
    assert torch.equal(masked, expected)


def test_training_draws_by_the_softmax_of_the_scores() -> None:
    """Where one patch token passes, it is each with its probability: noise that is Gumbel's, and no other, does that."""
    draws, temperatures = 20_000, (10.0, 0.1)
    selector = selector_of(2, 1).train()
    x = numbered(1, 9)
    scores = np.array(scores_by_hand(selector, x)[0][1:])
    expected = draws * np.exp(scores) / np.exp(scores).sum()
    assert expected.min() > 5
    assert expected.max() > 3 * expected.min()
    for temperature in temperatures:
        selector.temperatures = (temperature, temperature)
        selector.anneal(0.0)
        torch.manual_seed(2)
        passed = selector(x.expand(draws, -1, -1))[:, 1, -1].round().int().numpy()
        observed = np.bincount(passed, minlength=9)[1:]
        assert stats.chisquare(observed, expected).pvalue > 0.01


def test_several_are_drawn_one_after_another_without_putting_back() -> None:
    """Of three patch tokens two: the pairs' probabilities by hand."""
    draws = 20_000
    selector = selector_of(3, 1).train()
    x = numbered(1, 4, seed=3)
    chance = np.exp(scores_by_hand(selector, x)[0][1:])
    chance /= chance.sum()
    absent = [sum(chance[i] * chance[3 - i - left] / (1 - chance[i]) for i in range(3) if i != left) for left in range(3)]
    torch.manual_seed(4)
    passed = positions(selector(x.expand(draws, -1, -1)))
    left_out = [6 - a - b - 1 for _, a, b in passed]
    observed = np.bincount(left_out, minlength=3)
    assert math.isclose(sum(absent), 1.0)
    assert stats.chisquare(observed, draws * np.array(absent)).pvalue > 0.01


def test_noise_comes_from_the_given_generator_or_torchs_own() -> None:
    x = numbered(16, 12)
    own = selector_of(5, 1).train()
    torch.manual_seed(7)
    first, second = own(x), own(x)
    torch.manual_seed(7)
    assert torch.equal(own(x), first)
    assert not torch.equal(first, second)
    given = selector_of(5, 1).train()
    given.generator = torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(given(x), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_temperature_falls_on_a_line() -> None:
    selector = PaperSelector(8, 5, 1, temperature=10.0, final_temperature=0.1)
    assert selector.temperature == 10.0
    for progress, expected in ((0.0, 10.0), (0.25, 7.525), (0.5, 5.05), (1.0, 0.1)):
        selector.anneal(progress)
        assert selector.temperature == pytest.approx(expected)


@pytest.mark.parametrize("progress", [-0.1, 1.01, 100, float("nan")])
def test_a_progress_outside_training_is_refused(progress: float) -> None:
    """A number of steps, say."""
    selector = PaperSelector(8, 5, 1)
    with pytest.raises(OptionError, match=r"^progress = .*: is outside 0 to 1; give the fraction of training that is done$"):
        selector.anneal(progress)
    assert selector.temperature == 10.0


def test_the_temperature_is_in_no_state_and_no_cast_rounds_it() -> None:
    selector = PaperSelector(8, 5, 1)
    assert list(selector.state_dict()) == ["weight"]
    assert not list(selector.buffers())
    selector.anneal(1.0)
    assert selector.bfloat16().temperature == pytest.approx(0.1, rel=1e-12)


def test_scores_are_fp32_for_bf16_tokens() -> None:
    """Scores that bf16 can't tell apart decide."""
    selector = PaperSelector(2, 2, 0).eval().bfloat16()
    selector.weight.detach().copy_(torch.tensor([[1.0, 2.0**-10]]))
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]]).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert selector(x)[0, :, 1].tolist() == [1.0, 2.0]


def test_programmers_mistakes() -> None:
    with pytest.raises(ValueError, match="2 tokens leave no patch token beside 2 prefix tokens"):
        PaperSelector(8, 2, 2)
    with pytest.raises(ValueError, match="mode 'drop' is neither"):
        PaperSelector(8, 3, 2, mode="drop")
    with pytest.raises(ValueError, match="can't keep 5 of 4 tokens"):
        PaperSelector(8, 5, 1)(torch.zeros(1, 4, 8))
