"""An epoch over remote shards whose line is as fast as training: with and without room for the next window in the cache."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import ratio
from svite_scale.config.schema import DataConfig
from svite_scale.data.loader import TrainData
from svite_scale.data.make.shards import Sample, write_shards

SIZE, BATCH, PER_SHARD, WINDOW, WINDOWS, WORKERS = 32, 16, 32, 4, 5, 2
FETCH_S = 0.5
"""Of one shard, by one connection."""
STEP_S = 0.25
"""Of a training step, so that a window takes 2 s, in which one connection fetches 4 shards."""
STEPS = WINDOW * WINDOWS * PER_SHARD // BATCH
ROOM = {"room for one window": 1, "room for two": 2}


def remote_section(arguments: argparse.Namespace) -> None:
    """Seconds of the first epoch, in turns. A fetch sleeps before it reads the file, and so does a step of training."""
    seconds: dict[str, list[float]] = {name: [] for name in ROOM}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_shards(noise(WINDOW * WINDOWS * PER_SHARD), directory / "shards", "train", PER_SHARD)
        for turn in range(arguments.rounds):
            for name in list(ROOM)[:: -1 if turn % 2 else 1]:
                seconds[name].append(epoch_seconds(directory, ROOM[name], directory / f"cache-{turn}-{ROOM[name]}"))
    print(f"\n{f'{WINDOWS} windows of {WINDOW} remote shards':38} {'seconds':>10} {'training alone / it':>20}")
    for name, values in seconds.items():
        print(f"{name:38} {statistics.median(values):10.2f} {STEPS * STEP_S / statistics.median(values):20.3f}")
    one, two = (seconds[name] for name in ROOM)
    print(f"with room for two windows the epoch takes {ratio(two, one):.3f} of the time")


def noise(count: int) -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for number in range(count):
        content = BytesIO()
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(content, "png")
        samples.append(Sample(f"noise-{number:05d}", content.getvalue(), "png", 0))
    return samples


def epoch_seconds(directory: Path, windows: int, cache: Path) -> float:
    """From before the first sample, with an empty cache."""
    sizes = [path.stat().st_size for path in (directory / "shards").glob("*.tar")]
    last = len(sizes) - 1
    config = DataConfig(
        train=f"pipe:sleep {FETCH_S}; cat {directory}/shards/train-{{000000..{last:06d}}}.tar",
        cache_dir=str(cache),
        # The indexes are in it too.
        cache_gb=(windows * WINDOW + 0.5) * max(sizes) / 1e9,
        shuffle_shards=WINDOW,
        workers=WORKERS,
    )
    data = data_of_one_rank(config, SIZE, BATCH)
    start = time.perf_counter()
    for _ in data.batches(0, STEPS):
        time.sleep(STEP_S)
    return time.perf_counter() - start


def data_of_one_rank(config: DataConfig, image_size: int, batch_size: int) -> TrainData:
    return TrainData(
        config,
        image_size=image_size,
        in_channels=3,
        global_batch_size=batch_size,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
    )
