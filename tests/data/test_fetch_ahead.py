"""While one shuffle group of remote shards is read, those of the next are fetched."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from svite_scale.data.fetch_ahead import FetchAhead, check_cache_room
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.options import AugmentConfig, DataConfig
from svite_scale.data.order import EpochSteps, epoch_order
from svite_scale.data.remote.cache import RemoteShard
from svite_scale.errors import ConfigError, DataError
from tests.data.flaky_server import Server
from tests.data.numbered import grey_config, numbers, train_data, write_numbered
from tests.data.remote import files_of, link_shards
from tests.waiting import wait_until

NUM_SHARDS, PER_SHARD, GROUP, BATCH = 8, 6, 2, 4
STEPS_PER_GROUP = GROUP * PER_SHARD // BATCH
NAMES = [f"train-{number:06d}.tar" for number in range(NUM_SHARDS)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_numbered(folder, NUM_SHARDS * PER_SHARD, PER_SHARD)
    assert sorted(path.name for path in folder.glob("*.tar")) == NAMES
    return folder


def config_of(root: str, cache: Path, repeats: int = 1, **fields: object) -> DataConfig:
    augment = AugmentConfig(repeats=repeats)
    pattern = f"{root}/train-{{000000..{NUM_SHARDS - 1:06d}}}.tar"
    named = {"cache_dir": str(cache), "workers": 0, "shuffle_shards": GROUP, "augment": augment, **fields}
    return grey_config(train=pattern, val=pattern, **named)


def shards_of_steps(served: Path, steps: int, repeats: int = 1) -> list[set[str]]:
    """The shards of each step's samples, read from local files."""
    batches = train_data(config_of(str(served), served, repeats), BATCH).batches(0, steps)
    return [{NAMES[number // PER_SHARD] for number in numbers(batch)} for batch in batches]


def cached(folder: Path) -> set[str]:
    return {name for name in files_of(folder) if name.endswith(".tar")}


def test_the_next_group_is_fetched_while_this_one_is_read(served: Path, server: Server, tmp_path: Path) -> None:
    steps = NUM_SHARDS * PER_SHARD // BATCH
    shards = shards_of_steps(served, steps)
    batches = train_data(config_of(f"{server.root}/ok", tmp_path), BATCH).batches(0, steps)
    for step, _ in enumerate(batches):
        next_group = step // STEPS_PER_GROUP + 1
        expected = set().union(*shards[: (next_group + 1) * STEPS_PER_GROUP])
        if step % STEPS_PER_GROUP == STEPS_PER_GROUP - 1:
            wait_until(lambda expected=expected: cached(tmp_path) == expected)
        assert cached(tmp_path) <= expected
    assert {name: count for name, count in server.requests().items() if name in NAMES} == dict.fromkeys(NAMES, 1)


def test_the_first_group_of_the_next_epoch_is_fetched_too(served: Path, server: Server, tmp_path: Path) -> None:
    """With three copies of a sample, an epoch is one group of 36 rows and the first 12 rows of another."""
    steps_of_groups = [9, 3, 9, 3]
    shards = shards_of_steps(served, sum(steps_of_groups), repeats=3)
    batches = train_data(config_of(f"{server.root}/ok", tmp_path, repeats=3), BATCH).batches(0, len(shards))
    seen = 0
    for group, steps in enumerate(steps_of_groups):
        for _ in range(steps):
            next(batches)
        seen += steps
        coming = set().union(*shards[: sum(steps_of_groups[: group + 2])])
        wait_until(lambda coming=coming: cached(tmp_path) >= coming)
        assert len(cached(tmp_path)) <= GROUP * (group + 2)


def test_resuming_inside_a_group_fetches_the_one_after_it(served: Path, server: Server, tmp_path: Path) -> None:
    shards = shards_of_steps(served, 4 * STEPS_PER_GROUP)
    first = 2 * STEPS_PER_GROUP - 1
    batches = train_data(config_of(f"{server.root}/ok", tmp_path), BATCH).batches(first, 4 * STEPS_PER_GROUP)
    next(batches)
    expected = set().union(*shards[first : first + 1 + STEPS_PER_GROUP])
    wait_until(lambda: cached(tmp_path) == expected)


def test_shards_are_fetched_when_they_are_read_without_room_for_two_groups(
    served: Path, server: Server, tmp_path: Path
) -> None:
    shards = shards_of_steps(served, NUM_SHARDS * PER_SHARD // BATCH)
    room = 4 * max(path.stat().st_size for path in served.glob("*.tar")) - 1
    config = config_of(f"{server.root}/ok", tmp_path, cache_gb=room / 1e9)
    for step, _ in enumerate(train_data(config, BATCH).batches(0, len(shards))):
        assert set(server.requests()) & set(NAMES) == set().union(*shards[: step + 1])


class Recorder:
    """Replaces a cache, and records the numbers of the requested shards."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def open_shard(self, url: str, size: int, digest: str) -> int:
        self.asked.append(int(url))
        return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("batch", [16, 60, 1])
def test_the_next_epoch_is_fetched_in_time_after_a_small_last_group(batch: int, ends: bool) -> None:
    """17 shards of 16 in groups of 4: the last group is one shard, which a batch may skip, or leave out (at 60)."""
    cache, empty = Recorder(), np.zeros(16, dtype=np.int64)
    shards = [RemoteShard(str(number), 1, "", cache) for number in range(17)]  # type: ignore[arg-type]
    indexes = [ShardIndex(shard, 1, "", "", empty, empty, empty, b"") for shard in shards]  # type: ignore[arg-type]
    steps = EpochSteps(17 * 16, batch, carry=False)
    last_step = int(steps.per_epoch) if ends else None
    orders = [epoch_order([16] * 17, 0, epoch, 4, 1)[: steps.rows_per_epoch, 0] // 16 for epoch in range(2)]
    first_group = set(orders[1][:64].tolist())
    assert len(first_group) == 4
    with FetchAhead(grey_config(shuffle_shards=4), indexes, steps, last_step, 0, 0) as fetch_ahead:
        for step in range(256 // batch):
            for epoch, _, stop in steps.pieces(step):
                fetch_ahead.advance_to(epoch, stop - 1)
        if ends:
            wait_until(lambda: len(cache.asked) == len(set(orders[0].tolist())) - 4)
        else:
            # While the last large group is read, the small one and as much of the next epoch's first as makes up for it.
            wait_until(lambda: len(first_group & set(cache.asked[-4:])) >= 3)
    read = set(orders[0].tolist()) | (set() if ends else first_group)
    assert set(cache.asked) <= read, "nothing that no step reads"


def test_a_shard_that_can_not_be_fetched_ends_the_run_when_it_is_read(served: Path, tmp_path: Path) -> None:
    shards = shards_of_steps(served, 2 * STEPS_PER_GROUP)
    missing = min(set().union(*shards[STEPS_PER_GROUP:]))
    link_shards(served, tmp_path / "shards", missing)
    config = config_of(f"pipe:cat {tmp_path}/shards", tmp_path / "cache", fetch_attempts=1)
    batches = train_data(config, BATCH).batches(0, 2 * STEPS_PER_GROUP)
    for _ in range(STEPS_PER_GROUP):
        next(batches)
    with pytest.raises(DataError, match=rf"{missing} can't be fetched"):
        list(batches)


@pytest.mark.parametrize(("shards_per_group", "fits"), [(1, True), (2, True), (3, False), (64, False)])
def test_the_cache_must_hold_one_shuffle_group(shards_per_group: int, fits: bool) -> None:
    config = DataConfig(cache_gb=5.0, shuffle_shards=shards_per_group)
    sizes = [10**9, 3 * 10**9, 2 * 10**9, 10**9]
    if fits:
        check_cache_room(config, sizes)
        return
    with pytest.raises(
        ConfigError, match=rf"data\.cache_gb = 5\.0: doesn't hold the data\.shuffle_shards = {shards_per_group} shards"
    ):
        check_cache_room(config, sizes)
    check_cache_room(config, [])
