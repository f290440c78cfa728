"""Hashed random numbers against splitmix64 written out in Python's own integers."""

from __future__ import annotations

import pytest
import torch

from svite_scale.sparsity.hashing import CHUNK, hashed_uniform
from tests import reference


@pytest.mark.parametrize(("seed", "step", "name"), [(0, 0, "head"), (7, 140, "blocks.3.attn.qkv"), (2**31 - 1, 600_000, "")])
def test_numbers_are_splitmix64_of_the_key(seed: int, step: int, name: str) -> None:
    assert hashed_uniform(seed, step, name, 500).tolist() == reference.hashed_uniform(seed, step, name, range(500))


def test_a_longer_layer_begins_with_the_numbers_of_a_shorter_one() -> None:
    assert torch.equal(hashed_uniform(1, 2, "fc", 1000)[:10], hashed_uniform(1, 2, "fc", 10))


def test_gathered_chunks_are_the_whole() -> None:
    expected = reference.hashed_uniform(0, 0, "fc", range(CHUNK - 2, CHUNK + 3))
    assert hashed_uniform(0, 0, "fc", CHUNK + 3)[-5:].tolist() == expected


@pytest.mark.parametrize("other", [(1, 2, "x"), (0, 3, "x"), (0, 2, "y")])
def test_seed_step_and_name_each_change_all_numbers(other: tuple[int, int, str]) -> None:
    assert not (hashed_uniform(0, 2, "x", 500) == hashed_uniform(*other, 500)).any()


def test_numbers_are_uniform() -> None:
    numbers = hashed_uniform(0, 0, "x", 1_000_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    tenths = torch.histc(numbers.float(), bins=10, min=0, max=1)
    assert (tenths - 100_000).abs().max() < 5 * 300  # 5 standard deviations of a binomial
    assert numbers.unique().numel() > 0.96 * numbers.numel()  # 2**24 numbers, a million draws: 3% coincide
