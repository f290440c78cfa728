"""The quality of the shuffling, the number of shards that a rank reads, and the figures of benchmarks/data.py on both."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.data_order import locality, most_open, shard_counts, shuffling
from svite_scale.data.order import epoch_order

COUNTS, GROUP = shard_counts(64_000, 320), 32


@pytest.fixture(scope="module")
def order() -> np.ndarray:
    return epoch_order(COUNTS, seed=0, epoch=0, shuffle_shards=GROUP, repeats=1)[:, 0]


def test_shards_share_the_samples_evenly() -> None:
    assert shard_counts(11, 4) == [3, 3, 3, 2]


def test_figures_of_orders_made_by_hand() -> None:
    counts = [2, 2, 2]
    in_place = shuffling(np.arange(6), counts, batch=2)
    # Neighbours are one apart; two of five pairs lie across a border of shards.
    assert list(in_place.values()) == pytest.approx([0, 1 / 6, 2 / 5 / 3, 3 / 5, 1])
    # 5 + 3 + 1 + 1 + 3 + 5 places; the last two shards' samples are the neighbours across borders.
    backwards = shuffling(np.arange(6)[::-1].copy(), counts, batch=3)
    assert list(backwards.values()) == pytest.approx([18 / 6 / 6, 1 / 6, 2 / 5 / 3, 3 / 5, 2])


def test_shards_read_in_orders_made_by_hand() -> None:
    assert most_open(np.array([0, 1, 0, 2, 1, 2])) == 2
    assert most_open(np.array([0, 0, 1, 1])) == 1
    # Of steps of four samples the second rank takes two, which lie in two shards in two of the ten steps.
    assert locality(np.arange(40), [10] * 4, batch=4, rank=1, world_size=2) == (1.2, 4, 1, 4)


def test_the_order_shuffles_almost_like_a_true_permutation(order: np.ndarray) -> None:
    """A permutation moves a sample by a third of the epoch on average, and its neighbours are as far apart."""
    found = shuffling(order, COUNTS)
    for quantity in ("mean displacement", "mean distance of neighbours", "mean distance of neighbours' shards"):
        assert found[quantity] == pytest.approx(1 / 3, rel=0.06), quantity
    # Two samples of a group are in the same shard as often as by chance.
    assert found["fraction of neighbours in the same shard"] == pytest.approx(1 / GROUP, rel=0.1)
    # A batch of 1,024 out of a group of 6,400 samples misses none of its shards.
    assert GROUP <= found["shards in a batch of 1,024"] <= GROUP * 1.2


@pytest.mark.parametrize("world_size", [1, 4, 64])
def test_a_rank_reads_few_shards_at_a_time(order: np.ndarray, world_size: int) -> None:
    per_step, _, most, _ = locality(order, COUNTS, 1_024, world_size - 1, world_size)
    assert per_step <= min(GROUP * 1.2, 1_024 / world_size)
    # If a group ends within a step, the shards of two groups are open.
    assert most <= 2 * GROUP


def test_a_poor_shuffle_shows() -> None:
    """A poor shuffle misses the bounds above."""
    found = shuffling(epoch_order(COUNTS, seed=0, epoch=0, shuffle_shards=1, repeats=1)[:, 0], COUNTS)
    assert found["fraction of neighbours in the same shard"] > 0.9
    assert found["mean distance of neighbours' shards"] < 0.01
