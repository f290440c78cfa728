"""Training and evaluation data over HTTP equal those over local files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.loader import Batch
from svite_scale.data.options import AugmentConfig, DataConfig
from svite_scale.errors import ConfigError, DataError
from tests.data.flaky_server import Server
from tests.data.numbered import assert_same_batches, eval_data, grey_config, train_data
from tests.data.remote import files_of, in_processes, link_shards

SHARDS = [f"train-{number:06d}.tar" for number in range(6)]
BRACES = "train-{000000..000005}.tar"
BATCH, STEPS = 12, 9


@pytest.fixture(scope="module")
def served(many: str) -> Path:
    folder = Path(many).parent
    assert sorted(path.name for path in folder.glob("*.tar")) == SHARDS
    return folder


def config_of(pattern: str, cache_dir: Path, workers: int, **fields: object) -> DataConfig:
    affine = AugmentConfig(recipe="affine", repeats=2)
    named = {"train": pattern, "val": pattern, "cache_dir": str(cache_dir), "augment": affine, "shuffle_shards": 2, **fields}
    return grey_config(workers=workers, **named)


def training(config: DataConfig, rank: int = 0) -> list[Batch]:
    return list(train_data(config, BATCH, 1, rank, 2).batches(0, STEPS))


def save_training(config: DataConfig, rank: int, path: Path) -> None:
    torch.save([tuple(batch) for batch in training(config, rank)], path)


def test_training_over_http_gives_the_samples_of_local_files(tmp_path: Path, served: Path, server: Server) -> None:
    """2 ranks with 2 workers each read through one cache, over an unreliable connection."""
    remote = config_of(f"{server.root}/cut-1/{BRACES}", tmp_path / "cache", 2)
    local = config_of(f"{served}/{BRACES}", tmp_path / "unused", 0)
    in_processes(save_training, [(remote, rank, tmp_path / f"{rank}.pt") for rank in range(2)])
    for rank in range(2):
        assert_same_batches([Batch(*batch) for batch in torch.load(tmp_path / f"{rank}.pt")], training(local, rank))
    # Every shard, and its index: once cut short, and once whole.
    assert server.requests() == dict.fromkeys([*SHARDS, *(f"{name}.index.json" for name in SHARDS)], 2)
    assert files_of(tmp_path / "cache") == sorted([*SHARDS, *(f"{name}.index.json" for name in SHARDS)])
    assert not (tmp_path / "unused").exists()


def test_training_works_through_a_cache_that_holds_two_shards_of_six(tmp_path: Path, served: Path, server: Server) -> None:
    shard = max(path.stat().st_size for path in served.glob("*.tar"))
    small = config_of(f"{server.root}/ok/{BRACES}", tmp_path / "cache", 0, cache_gb=(2 * shard + 2_000) / 1e9)
    assert_same_batches(training(small), training(config_of(str(served), tmp_path, 0)))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()) <= 2 * shard + 2_000
    with pytest.raises(ConfigError, match=r"doesn't hold the data\.shuffle_shards = 3 shards"):
        train_data(config_of(small.train, tmp_path / "cache", 0, cache_gb=small.cache_gb, shuffle_shards=3), BATCH)
    train_data(config_of(str(served), tmp_path, 0, cache_gb=small.cache_gb, shuffle_shards=3), BATCH)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_through_commands_gives_the_samples_of_local_files(tmp_path: Path, served: Path, workers: int) -> None:
    remote = config_of(f"pipe:cat {served}/{BRACES}", tmp_path / "cache", workers)
    assert_same_batches(list(eval_data(remote, 8)), list(eval_data(config_of(str(served), tmp_path, 0), 8)))


def test_only_indexes_are_fetched_before_a_sample_is_read(tmp_path: Path, server: Server) -> None:
    config = config_of(f"{server.root}/ok/{BRACES}", tmp_path, 0)
    train_data(config, BATCH), eval_data(config, BATCH)
    assert server.requests() == {f"{name}.index.json": 1 for name in SHARDS}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_can_not_be_fetched_ends_the_stream_with_its_url(tmp_path: Path, served: Path, workers: int) -> None:
    link_shards(served, tmp_path / "shards", missing=SHARDS[3])
    pattern = f"pipe:cat {tmp_path}/shards/{BRACES}"
    config = config_of(pattern, tmp_path / "cache", workers, fetch_attempts=1)
    with pytest.raises(DataError, match=r"^pipe:cat .*-000003\.tar can't be fetched: exit status 1, cat: .*") as caught:
        list(eval_data(config, 8))
    assert "\n" not in str(caught.value)


def test_messages_about_a_shard_have_its_url(served: Path, tmp_path: Path) -> None:
    url = f"pipe:cat {served}/{SHARDS[0]}"
    (index,) = load_indexes(url, "data.val", DataConfig(cache_dir=str(tmp_path)))
    assert f"{index.path}" == url


def test_a_bad_index_is_named_and_removed_from_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.tar.index.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match=rf"^pipe:cat {tmp_path}/a\.tar\.index\.json has format 99, .*make_shards\.py --index"):
        load_indexes(f"pipe:cat {tmp_path}/a.tar", "data.val", DataConfig(cache_dir=str(tmp_path / "cache"), fetch_attempts=1))
    assert files_of(tmp_path / "cache") == []


def test_the_first_missing_index_ends_the_start(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=r"/ok/x-0000\.tar\.index\.json can't be fetched: .* 404"):
        load_indexes(f"{server.root}/ok/x-{{0000..0999}}.tar", "data.val", DataConfig(cache_dir=str(tmp_path / "cache")))
    assert sum(server.requests().values()) < 500
