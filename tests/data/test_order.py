"""The global order: a permutation in shuffle groups, repeated augmentation, ranks' rows, exactly-once evaluation."""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from svite_scale.data.order import epoch_order, evaluation_rows, rank_rows

COUNTS = [5, 1, 9, 4, 7, 0, 6]
TOTAL = sum(COUNTS)
GOLDEN = [9, 8, 6, 10, 5, 11, 4, 7, 0, 3, 2, 1]
GOLDEN_HASH = "6398a9a17a5c7109"


@pytest.mark.parametrize("group", [1, 2, 3, 7, 100])
def test_an_epoch_is_a_permutation(group: int) -> None:
    order = epoch_order(COUNTS, seed=1, epoch=2, shuffle_shards=group, repeats=1)
    assert order.shape == (TOTAL, 2)
    assert order.dtype == np.int64
    assert sorted(order[:, 0]) == list(range(TOTAL))
    assert not order[:, 1].any()


@pytest.mark.parametrize("group", [1, 2, 3])
def test_samples_stay_within_groups_of_permuted_shards(group: int) -> None:
    order = epoch_order(COUNTS, seed=1, epoch=2, shuffle_shards=group, repeats=1)[:, 0]
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    seen: list[int] = []
    position = 0
    while position < TOTAL:
        # Grow a group until it holds `group` shards completely; the empty shard may count among them unseen.
        shards: set[int] = set()
        size = 0
        while size == 0 or size < sum(COUNTS[shard] for shard in shards):
            shards.add(int(shard_of[order[position + size]]))
            size += 1
        assert len(shards) <= group
        seen += sorted(shards)
        position += size
    assert sorted(seen) == [0, 1, 2, 3, 4, 6]  # no shard is in two groups


def test_shards_are_permuted_and_samples_mixed_within_a_group() -> None:
    counts = [50] * 8
    shard_of = np.repeat(np.arange(8), counts)
    ordered = shard_of[epoch_order(counts, seed=0, epoch=0, shuffle_shards=1, repeats=1)[:, 0]]
    assert [int(shard) for shard in ordered[::50]] != list(range(8))
    mixed = shard_of[epoch_order(counts, seed=0, epoch=0, shuffle_shards=4, repeats=1)[:, 0]]
    assert [len(set(mixed[start : start + 50].tolist())) for start in (0, 50, 200, 250)] == [4, 4, 4, 4]
    assert not set(mixed[:200].tolist()) & set(mixed[200:].tolist())


def test_every_place_is_equally_likely() -> None:
    places = [int(np.flatnonzero(epoch_order([6], 0, epoch, 1, 1)[:, 0] == 2)[0]) for epoch in range(1200)]
    counts = np.bincount(places, minlength=6)
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = {epoch_order(COUNTS, seed, epoch, 3, 1)[:, 0].tobytes() for seed, epoch in product(range(4), range(4))}
    assert len(orders) == 16


def test_the_order_is_the_one_that_earlier_runs_saw() -> None:
    """Resuming a run after an upgrade must find the same order: a change here breaks every checkpoint."""
    order = epoch_order([4, 3, 5], seed=7, epoch=1, shuffle_shards=2, repeats=1)[:, 0]
    assert order.tolist() == GOLDEN
    large = epoch_order([1000] * 40, seed=2**31 - 1, epoch=299, shuffle_shards=8, repeats=3)
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_HASH


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeats_come_in_succession_and_keep_the_length(repeats: int) -> None:
    once = epoch_order(COUNTS, 1, 2, 3, 1)[:, 0].tolist()
    expected = [(sample, copy) for sample in once for copy in range(repeats)][:TOTAL]
    assert [tuple(row) for row in epoch_order(COUNTS, 1, 2, 3, repeats).tolist()] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_global_batch_without_overlap(world_size: int) -> None:
    rows = np.arange(24).reshape(12, 2)
    dealt = [rank_rows(rows, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in dealt} == {12 // world_size}
    assert sorted(np.concatenate(dealt)[:, 0].tolist()) == rows[:, 0].tolist()


@pytest.mark.parametrize(("world_size", "repeats"), [(2, 2), (3, 3), (4, 3), (4, 2)])
def test_copies_of_a_sample_go_to_different_ranks(world_size: int, repeats: int) -> None:
    order = epoch_order([48], 0, 0, 1, repeats)
    for start in range(0, 48, 24):
        for rank in range(world_size):
            samples = rank_rows(order[start : start + 24], rank, world_size)[:, 0].tolist()
            assert len(set(samples)) == len(samples)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("repeats", [2, 3])
def test_copies_lie_where_timm_puts_them(world_size: int, repeats: int) -> None:
    """DeiT's sampler over the same permutation gives each rank the same samples in the same order."""
    order = epoch_order(COUNTS, 1, 2, 3, repeats)
    shuffled = epoch_order(COUNTS, 1, 2, 3, 1)[:, 0]
    batch, stop = 8 * world_size if world_size < 4 else 24, TOTAL // 24 * 24
    for rank in range(world_size):
        sampler = RepeatAugSampler(
            shuffled, num_replicas=world_size, rank=rank, shuffle=False, num_repeats=repeats, selected_round=0
        )
        theirs = shuffled[list(sampler)][: stop // world_size].tolist()
        batches = [order[start : start + batch] for start in range(0, stop, batch)]
        ours = [int(sample) for rows in batches for sample in rank_rows(rows, rank, world_size)[:, 0]]
        assert ours[: len(theirs)] == theirs
        assert len(theirs) == stop // world_size


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="10 rows is not divisible by world size 3"):
        rank_rows(np.zeros((10, 2), dtype=np.int64), 0, 3)


@pytest.mark.parametrize(("count", "batch_size", "world_size"), list(product([1, 2, 7, 12, 13], [1, 3, 4], [1, 2, 3, 4])))
def test_evaluation_counts_every_sample_once(count: int, batch_size: int, world_size: int) -> None:
    parts = [evaluation_rows(count, batch_size, rank, world_size) for rank in range(world_size)]
    shape = (-(-count // (batch_size * world_size)), batch_size)
    assert all(samples.shape == valid.shape == shape for samples, valid in parts)
    assert sorted(sample for samples, valid in parts for sample in samples[valid].tolist()) == list(range(count))
    assert all(samples.min() >= 0 and samples.max() < count for samples, _ in parts)
