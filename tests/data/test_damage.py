"""Damaged samples during a run: replaced, marked, reported once, and an error if there are too many."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from svite_scale.data.damage import MIN_SEEN, DamageLimit
from svite_scale.data.make.shards import Sample, write_shards
from svite_scale.data.options import AugmentConfig, DataConfig
from svite_scale.errors import DataError
from tests.data.numbered import eval_data, grey_config, image_bytes, numbered, numbers, speckled, train_data

BROKEN = {4: 5, 9: 0, 21: 24, 22: 24, 23: 24}
"""Samples that can't be decoded, in shards of 10 and a last one of 5, and the samples that replace them."""
COUNT, BATCH = 25, 12


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    contents = {4: b"", 9: b"junk", 21: speckled(21)[:-30], 22: speckled(22)[:40], 23: b"\xff\xd8\xff"}
    samples = [sample._replace(image=contents.get(i, sample.image)) for i, sample in enumerate(numbered(COUNT))]
    directory = Path(tmp_path_factory.mktemp("damaged"))
    write_shards(samples, directory, "train", 10)
    return f"{directory}/train-*.tar"


def config_of(damaged: str, workers: int = 0, **fields: object) -> DataConfig:
    return grey_config(train=damaged, val=damaged, workers=workers, last_batch="carry", shuffle_shards=2, **fields)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0), (4, 1)])
def test_the_next_sample_of_the_shard_replaces_a_damaged_one(damaged: str, world: int, workers: int) -> None:
    """25 steps of 12 are 12 epochs, so each damaged sample is replaced 12 times, by a sample with its own label."""
    found: list[int] = []
    marked: list[int] = []
    for rank in range(world):
        for batch in train_data(config_of(damaged, workers), BATCH, 1, rank, world).batches(0, 25):
            assert batch.valid.all()
            rank_numbers = np.array(numbers(batch))  # checks labels too
            found += rank_numbers.tolist()
            marked += rank_numbers[batch.damaged].tolist()
    assert sorted(found) == sorted(12 * [BROKEN.get(number, number) for number in range(COUNT)])
    assert sorted(marked) == sorted(12 * list(BROKEN.values()))


def test_a_replacement_is_augmented_like_the_sample_itself(damaged: str) -> None:
    """In an epoch of one batch a replacement comes twice or more, and looks the same each time, on any number of ranks."""
    config = config_of(damaged, augment=AugmentConfig(recipe="affine"))

    alone, together = (
        [next(train_data(config, COUNT, 1, rank, world).batches(0, 1)) for rank in range(world)] for world in (1, 5)
    )
    replacements = image_bytes(alone, damaged=True)
    assert replacements == image_bytes(together, damaged=True)
    assert len(replacements) == len(set(BROKEN.values()))
    assert set(replacements) <= set(image_bytes(alone))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_damaged_sample_is_reported_once(damaged: str, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    package = logging.getLogger("svite_scale")
    before = package.level
    package.setLevel(logging.ERROR)  # as on ranks other than the main one
    try:
        list(train_data(config_of(damaged, workers), BATCH).batches(0, 6))
    finally:
        package.setLevel(before)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "can't be decoded" in record.message
    assert any(f"sample 'sample-{number:03d}' at byte " in record.message for number in BROKEN)
    assert "another one of its shard replaces it" in record.message


def one_line(pattern: str) -> str:
    """Returns a pattern for a message of one line.

    A test that kept the error would keep the stream too. torch waits 5 s for each worker of a stream that is garbage collected.
    """
    return rf"\A[^\n]*{pattern}[^\n]*\Z"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_damaged_sample_ends_the_stream_when_none_is_allowed(damaged: str, workers: int) -> None:
    with pytest.raises(DataError, match=one_line(r"train-00000[0-2]\.tar: the image of sample 'sample-0\d\d' at byte \d+")):
        list(train_data(config_of(damaged, workers, max_damaged=0.0), COUNT).batches(0, 1))
    with pytest.raises(DataError, match="the image of sample 'sample-004'"):
        list(eval_data(config_of(damaged, workers, max_damaged=0.0), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_without_a_decodable_sample_ends_the_stream(tmp_path: Path, workers: int) -> None:
    write_shards([Sample(f"s{i}", b"junk", "png", 0) for i in range(4)], tmp_path, "t", 9)
    with pytest.raises(DataError, match=one_line(r"t-000000\.tar: .* and no other sample of that shard")):
        list(train_data(config_of(str(tmp_path), workers), 4).batches(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_ends_the_stream_at_once(tmp_path: Path, workers: int) -> None:
    """It is truncated after the start, and not mistaken for damaged samples."""
    shards = write_shards(numbered(20), tmp_path, "t", 10)
    data = train_data(config_of(str(tmp_path), workers), 20)
    with open(shards[1], "r+b") as file:
        file.truncate(6000)
    with pytest.raises(DataError, match=one_line(r"t-000001\.tar ends before byte")):
        next(data.batches())


def test_a_missing_shard_ends_the_stream_at_once(tmp_path: Path) -> None:
    shards = write_shards(numbered(20), tmp_path, "t", 10)
    data = train_data(config_of(str(tmp_path)), 20)
    shards[0].unlink()
    with pytest.raises(DataError, match=r"t-000000\.tar can't be read"):
        next(data.batches())


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (3, 0)])
def test_evaluation_leaves_damaged_samples_out_and_counts_each_once(damaged: str, world: int, workers: int) -> None:
    valid: list[int] = []
    marked = 0
    for rank in range(world):
        data = eval_data(config_of(damaged, workers), 4, rank, world)
        for batch in data:
            assert batch.images.shape == (4, 1, 8, 8)
            assert not (batch.valid & batch.damaged).any()
            assert not batch.images[batch.damaged].any()
            valid += batch.images[batch.valid][:, 0, 0, 0].tolist()
            marked += int(batch.damaged.sum())
    assert sorted(valid) == [number for number in range(COUNT) if number not in BROKEN]
    assert marked == len(BROKEN)


def test_a_damaged_last_sample_is_not_counted_again_as_padding(tmp_path: Path) -> None:
    write_shards([*numbered(4), Sample("last", b"", "png", 1)], tmp_path, "t", 9)
    batches = [batch for rank in range(2) for batch in eval_data(config_of(str(tmp_path)), 4, rank, 2)]
    assert sum(int(batch.damaged.sum()) for batch in batches) == 1
    assert sum(int(batch.valid.sum()) for batch in batches) == 4


def test_counts_are_added_and_checked_together_after_resuming() -> None:
    before = DamageLimit("data.train", 0.001, "it is left out")
    before.add(3, MIN_SEEN)
    before.add(4, MIN_SEEN)
    resumed = DamageLimit("data.train", 0.001, "it is left out")
    resumed.load_state_dict(before.state_dict())
    resumed.add(23, MIN_SEEN)
    assert (resumed.damaged, resumed.seen) == (30, 3 * MIN_SEEN)
    with pytest.raises(DataError, match=r"31 of 30,001 samples"):
        resumed.add(1, 1)


@pytest.mark.parametrize(
    ("damaged", "seen", "fatal"),
    [
        (0, 10, False),
        (10, 500, False),
        (11, 500, True),
        (11, MIN_SEEN, True),
        (30, 30_000, False),
        (31, 30_000, True),
        (5, 5, True),
    ],
)
def test_the_limit_is_a_fraction_of_at_least_ten_thousand_samples(damaged: int, seen: int, fatal: bool) -> None:
    limit = DamageLimit("data.train", 0.001, "it is left out")
    limit.report([])
    limit.report(["shard: the image of sample 'a'"])
    if not fatal:
        limit.check(damaged, seen)
        return
    with pytest.raises(
        DataError, match=rf"{damaged:,} of {seen:,} samples of data\.train .* data\.max_damaged = 0\.001; .*'a'"
    ):
        limit.check(damaged, seen)
