"""Streams of batches: the same samples for every world size, accumulation, worker count and starting step."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from svite_scale.data.batches import copy_for_device
from svite_scale.data.options import AugmentConfig
from svite_scale.data.order import epoch_order
from svite_scale.errors import ConfigError, DataError
from tests.data.numbered import assert_same_batches, eval_data, grey_config, image_bytes, numbers, train_data

BATCH = 12
STEPS = 53 // BATCH
COUNTS = [10, 10, 10, 10, 10, 3]


def expected_steps(num_steps: int, repeats: int = 1) -> list[list[int]]:
    """The samples of each step, directly from the order."""
    epochs = [epoch_order(COUNTS, 3, epoch, 2, repeats)[:, 0].tolist() for epoch in range(num_steps // STEPS + 1)]
    return [epochs[step // STEPS][step % STEPS * BATCH :][:BATCH] for step in range(num_steps)]


def test_data_knows_its_number_of_samples_and_steps(many: str) -> None:
    data = train_data(grey_config(train=many), BATCH)
    assert (data.num_samples, data.steps.per_epoch) == (53, 4)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 3), (4, 1)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(many: str, world: int, accumulation: int, repeats: int) -> None:
    config = grey_config(train=many, workers=0, shuffle_shards=2, augment=AugmentConfig(repeats=repeats))
    streams = [train_data(config, BATCH, accumulation, rank, world).batches(0, 2 * STEPS + 1) for rank in range(world)]
    for expected in expected_steps(2 * STEPS + 1, repeats):
        for rank, stream in enumerate(streams):
            found: list[int] = []
            for batch in islice(stream, accumulation):
                assert batch.valid.all()
                assert len(batch.labels) == BATCH // world // accumulation
                found += numbers(batch)
            assert found == expected[rank::world]
    assert [next(stream, None) for stream in streams] == [None] * world


def test_an_epoch_shows_each_sample_at_most_once(many: str) -> None:
    data = train_data(grey_config(train=many, workers=0), BATCH)
    for epoch in range(3):
        seen = [number for batch in data.batches(epoch * STEPS, (epoch + 1) * STEPS) for number in numbers(batch)]
        assert len(seen) == len(set(seen)) == STEPS * BATCH


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 5, 9])
def test_resuming_at_any_step_gives_the_rest_of_the_stream(many: str, first: int, workers: int) -> None:
    affine = AugmentConfig(recipe="affine", repeats=2)
    whole = train_data(grey_config(train=many, workers=0, augment=affine), BATCH, 2, 1, 2).batches(0, 11)
    rest = train_data(grey_config(train=many, workers=workers, augment=affine), BATCH, 2, 1, 2).batches(first, 11)
    assert_same_batches(islice(whole, 2 * first, None), rest)


def test_resuming_on_other_ranks_loses_and_repeats_nothing(many: str) -> None:
    config = grey_config(train=many, workers=0, shuffle_shards=2)
    before = [batch for rank in range(2) for batch in train_data(config, BATCH, 1, rank, 2).batches(0, 6)]
    after = [batch for rank in range(3) for batch in train_data(config, BATCH, 2, rank, 3).batches(6, 8)]
    found = Counter(number for batch in [*before, *after] for number in numbers(batch))
    assert found == Counter(number for step in expected_steps(8) for number in step)


def test_the_stream_is_endless_without_a_last_step(many: str) -> None:
    stream = train_data(grey_config(train=many, workers=0), BATCH).batches(10**6)
    assert len(list(islice(stream, 9))) == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_no_batch_is_overwritten_before_it_is_copied(many: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader processes put images into a few slots in turn, and are faster than this process."""

    def slowly(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return copy_for_device(images)

    monkeypatch.setattr("svite_scale.data.batches.copy_for_device", slowly)
    batches = list(train_data(grey_config(train=many, workers=workers, shuffle_shards=2), BATCH).batches(0, 20))
    assert [numbers(batch) for batch in batches] == expected_steps(20)


@pytest.mark.parametrize("workers", [1, 2])
def test_augmented_batches_do_not_depend_on_the_workers(many: str, workers: int) -> None:
    deit = AugmentConfig(recipe="deit", repeats=2)
    alone = train_data(grey_config(train=many, workers=0, augment=deit), BATCH).batches(0, STEPS + 1)
    helped = train_data(grey_config(train=many, workers=workers, augment=deit), BATCH).batches(0, STEPS + 1)
    assert_same_batches(alone, helped)


def test_a_sample_looks_the_same_on_any_number_of_ranks_and_its_copies_differ(many: str) -> None:
    config = grey_config(train=many, workers=0, augment=AugmentConfig(recipe="affine", repeats=3))

    one, two, four = (
        image_bytes(batch for rank in range(world) for batch in train_data(config, BATCH, 1, rank, world).batches(0, STEPS))
        for world in (1, 2, 4)
    )
    assert one == two == four
    assert len(one) == STEPS * BATCH


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are processors
@pytest.mark.parametrize(
    ("world", "workers"),
    [*((world, 0) for world in range(1, 9)), (1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (5, 3), (6, 2), (7, 1), (8, 4)],
)
def test_steps_and_augmentation_are_those_of_one_process_at_any_world_size_and_workers(
    many: str, world: int, workers: int
) -> None:
    batch = 24 if 24 % world == 0 else 35
    affine = AugmentConfig(recipe="affine", repeats=3)

    def steps(world: int, workers: int) -> list[Counter[tuple[bytes, int]]]:
        config = grey_config(train=many, workers=workers, shuffle_shards=2, augment=affine)
        streams = [train_data(config, batch, 1, rank, world).batches(0, 3) for rank in range(world)]
        return [
            Counter(
                (image.numpy().tobytes(), label)
                for one in step
                for image, label in zip(one.images, one.labels.tolist(), strict=True)
            )
            for step in zip(*streams, strict=True)
        ]

    found = steps(world, workers)
    assert found == steps(1, 0)
    assert [one.total() for one in found] == [batch] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_of_training_alone(many: str, workers: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    affine = AugmentConfig(recipe="affine")
    list(train_data(grey_config(train=many, workers=workers, augment=affine), BATCH).batches(0, 2))
    list(eval_data(grey_config(val=many, workers=workers), 30))
    assert draw() == expected


@pytest.mark.parametrize(("world", "batch"), [(1, 8), (2, 8), (3, 5), (4, 30)])
def test_evaluation_counts_every_sample_exactly_once(many: str, world: int, batch: int) -> None:
    parts = [eval_data(grey_config(val=many, workers=0), batch, rank, world) for rank in range(world)]
    assert {data.num_samples for data in parts} == {53}
    for _ in range(2):
        rounds = [list(data) for data in parts]
        assert {len(batches) for batches in rounds} == {-(-53 // (world * batch))}
        assert {len(one.labels) for batches in rounds for one in batches} == {batch}
        found = [number for batches in rounds for one in batches for number in np.array(numbers(one))[one.valid].tolist()]
        assert sorted(found) == list(range(53))


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_workers(many: str) -> None:
    alone, helped = (list(eval_data(grey_config(val=many, workers=workers), 8, 1, 2)) for workers in (0, 2))
    assert_same_batches(alone, helped)


def test_errors_name_the_field(many: str) -> None:
    with pytest.raises(DataError, match=r"holds 53 samples, fewer than train.global_batch_size \(54\)"):
        train_data(grey_config(train=many), 54)
    with pytest.raises(DataError, match=r"data\.train is empty"):
        train_data(grey_config(val=many), BATCH)
    with pytest.raises(DataError, match=r"data\.val is empty"):
        eval_data(grey_config(train=many), BATCH)
    with pytest.raises(ValueError, match="12 samples do not divide into 2 ranks x 4 micro-batches"):
        train_data(grey_config(train=many), BATCH, 4, 0, 2)
    with pytest.raises(ConfigError, match="auto_augment"):
        train_data(grey_config(train=many, augment=AugmentConfig(recipe="deit", auto_augment="x")), BATCH)
