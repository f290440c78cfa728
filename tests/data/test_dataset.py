"""One sample: read at its place, decoded, and transformed with its own random numbers."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from svite_scale.data.dataset import ShardDataset, ShardReader
from svite_scale.data.format.patterns import largest_label, load_indexes
from svite_scale.data.make.shards import Sample, write_shards
from svite_scale.errors import DataError
from tests.data.numbered import numbered, picture


def pixels(image: Tensor) -> Tensor:
    return image


def draws(image: Tensor) -> Tensor:
    """A transform that returns what it draws from each generator."""
    return torch.tensor([random.random(), float(np.random.rand()), torch.rand(()).item()], dtype=torch.float64)


def dataset_of(pattern: str, transform: object = pixels, in_channels: int = 1, seed: int = 3) -> ShardDataset:
    return ShardDataset(load_indexes(pattern), transform, in_channels, seed)  # type: ignore[arg-type]


def test_every_sample_is_found_by_its_number(many: str) -> None:
    dataset = dataset_of(many)
    assert len(dataset) == 53
    assert dataset.counts == [10, 10, 10, 10, 10, 3]
    assert largest_label(dataset.indexes)[0] == 6
    for number in range(53):
        image, label = dataset[0, number, 0]
        assert image[0, 0, 0] == number
        assert label == number % 7


def test_images_become_grey_or_rgb(tmp_path: Path) -> None:
    write_shards(
        [Sample("grey", picture(70), "png", 0), Sample("color", picture(70, "jpg", mode="RGB"), "jpg", 1)], tmp_path, "t", 9
    )
    for channels in (1, 3):
        dataset = dataset_of(str(tmp_path), in_channels=channels)
        for sample in (0, 1):
            image = dataset[0, sample, 0][0]
            assert image.shape == (channels, 8, 8)
            assert image.unique().tolist() == [70]


def test_augmentation_depends_on_seed_epoch_sample_and_copy_alone(many: str) -> None:
    rows = [(epoch, sample, copy) for epoch in range(3) for sample in range(3) for copy in range(3)]
    drawn = {tuple(dataset_of(many, draws, seed=seed)[row][0].tolist()) for seed in (3, 4) for row in rows}
    assert len(drawn) == 54
    for generator in range(3):
        assert len({values[generator] for values in drawn}) == 54
    again = dataset_of(many, draws)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert {tuple(again[row][0].tolist()) for row in reversed(rows)} <= drawn


def fails(image: Tensor) -> Tensor:
    draws(image)
    raise RuntimeError("transform")


def test_global_random_state_is_left_alone(many: str) -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draws(torch.zeros(1))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    dataset_of(many, draws)[0, 0, 0]
    with pytest.raises(RuntimeError, match="transform"):
        dataset_of(many, fails)[0, 0, 0]
    assert torch.equal(draws(torch.zeros(1)), expected)


def test_an_undecodable_image_is_named(tmp_path: Path) -> None:
    cut = picture(5, "png")[:-25]
    (shard,) = write_shards(
        [*numbered(2), Sample("broken", cut, "png", 0), Sample("junk", b"junk", "jpg", 0)], tmp_path, "t", 9
    )
    dataset = dataset_of(str(tmp_path))
    offset = load_indexes(str(tmp_path))[0].offsets
    for sample, key in ((2, "broken"), (3, "junk")):
        with pytest.raises(DataError) as caught:
            dataset[0, sample, 0]
        for part in (str(shard), repr(key), f"byte {offset[sample]}"):
            assert part in str(caught.value)
    assert dataset[0, 1, 0][1] == 1


def test_a_shard_that_vanished_or_shrank_is_named(tmp_path: Path) -> None:
    first, second = write_shards(numbered(4), tmp_path, "t", 2)
    dataset = dataset_of(str(tmp_path))
    first.unlink()
    os.truncate(second, 600)
    with pytest.raises(DataError, match=r"t-000000\.tar can't be read"):
        dataset[0, 0, 0]
    with pytest.raises(DataError, match=r"t-000001\.tar ends before byte"):
        dataset[0, 2, 0]


def open_in(folder: Path) -> int:
    """Counts this process's descriptors of files in a folder. (Earlier tests may leave others.)"""
    leads = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return sum(Path(path).is_relative_to(folder.resolve()) for path in leads)


def test_the_reader_keeps_the_most_recently_used_files_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for path in paths:
        path.write_bytes(b"abc")
    reader = ShardReader(paths, max_open=2)
    for number in (0, 1, 0, 2):
        reader.read(number, 0, 3)
    for path in paths:
        path.unlink()
    assert reader.read(0, 0, 3) == reader.read(2, 0, 3) == b"abc"
    with pytest.raises(DataError, match=r"1\.bin can't be read"):
        reader.read(1, 0, 3)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors through /proc")
def test_the_reader_keeps_few_files_open_and_closes_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 8)
    reader = ShardReader(paths, max_open=3)
    assert open_in(tmp_path) == 0
    for number in [0, 1, 2, 0, 3, 4, 5, 0, 5, 1]:
        assert reader.read(number, 2, 3) == bytes([number]) * 3
    assert open_in(tmp_path) == 3
    copied = pickle.loads(pickle.dumps(reader))
    assert copied.read(4, 0, 2) == b"\x04\x04"
    assert open_in(tmp_path) == 4
    reader.close()
    assert open_in(tmp_path) == 1
    del copied
    assert open_in(tmp_path) == 0


@pytest.mark.slow
def test_descriptors_serve_forked_processes_too(many: str) -> None:
    dataset = dataset_of(many)
    dataset[0, 0, 0]
    child = os.fork()
    if not child:
        ok = all(dataset[0, number, 0][0][0, 0, 0] == number for number in range(53))
        os._exit(0 if ok else 1)
    for number in reversed(range(53)):
        assert dataset[0, number, 0][0][0, 0, 0] == number
    assert os.waitpid(child, 0)[1] == 0
