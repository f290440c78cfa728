"""An epoch over remote shards that come as fast as training: with and without room for the next shuffle group in the cache."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from svite_scale.data.loader import TrainData
from svite_scale.data.make.shards import Sample, write_shards
from svite_scale.data.options import DataConfig
from svite_scale.evaluation.timing import ratio

SIZE, BATCH, PER_SHARD, GROUP, GROUPS, WORKERS = 32, 16, 32, 4, 5, 2
FETCH_S = 0.5
"""Seconds to fetch one shard by one connection."""
STEP_S = 0.25
"""Seconds of a training step, so that a group takes 2 s, in which one connection fetches 4 shards."""
STEPS = GROUP * GROUPS * PER_SHARD // BATCH
ROOM = {"room for one group": 1, "room for two": 2}


def remote_section(arguments: argparse.Namespace) -> None:
    """Measures the first epoch, with and without room in turns. Fetches and training steps sleep for a fixed time."""
    seconds: dict[str, list[float]] = {name: [] for name in ROOM}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_shards(noise(GROUP * GROUPS * PER_SHARD), directory / "shards", "train", PER_SHARD)
        for turn in range(arguments.rounds):
            for name in list(ROOM)[:: -1 if turn % 2 else 1]:
                seconds[name].append(epoch_seconds(directory, ROOM[name], directory / f"cache-{turn}-{ROOM[name]}"))
    print(f"\n{f'{GROUPS} groups of {GROUP} remote shards':38} {'seconds':>10} {'training alone / it':>20}")
    for name, values in seconds.items():
        print(f"{name:38} {statistics.median(values):10.2f} {STEPS * STEP_S / statistics.median(values):20.3f}")
    one, two = (seconds[name] for name in ROOM)
    print(f"with room for two groups the epoch takes {ratio(two, one):.3f} of the time")


def noise(count: int) -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for number in range(count):
        content = BytesIO()
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(content, "png")
        samples.append(Sample(f"noise-{number:05d}", content.getvalue(), "png", 0))
    return samples


def epoch_seconds(directory: Path, groups: int, cache: Path) -> float:
    """Returns the seconds of the first epoch, from an empty cache."""
    sizes = [path.stat().st_size for path in (directory / "shards").glob("*.tar")]
    last = len(sizes) - 1
    config = DataConfig(
        train=f"pipe:sleep {FETCH_S}; cat {directory}/shards/train-{{000000..{last:06d}}}.tar",
        cache_dir=str(cache),
        # The cache holds the indexes too.
        cache_gb=(groups * GROUP + 0.5) * max(sizes) / 1e9,
        shuffle_shards=GROUP,
        workers=WORKERS,
    )
    data = data_of_one_rank(config, SIZE, BATCH)
    start = time.perf_counter()
    for _ in data.batches(0, STEPS):
        time.sleep(STEP_S)
    return time.perf_counter() - start


def data_of_one_rank(config: DataConfig, image_size: int, batch_size: int) -> TrainData:
    return TrainData(config, image_shape=(3, image_size, image_size), global_batch_size=batch_size, seed=0)
