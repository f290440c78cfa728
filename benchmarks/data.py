"""The data loader: its speed beside other loaders, and its order, shuffling, locality and remote shards.

    python benchmarks/data.py [--sections speed order shuffling locality remote] [--images 1280] [--rounds 8]

Speed is in samples per second of one core: a loader's one worker process and the process that iterates are pinned to the same
core. Images are 500 x 375 JPEGs made of scikit-learn's two photographs. All loaders apply DeiT's crop, flip and
rand-m9-mstd0.5-inc1 at 224 px, and give uint8 batches. They take turns of some seconds; a ratio is the median of the ratios
within a round. The other sections have an order of ImageNet's size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.data_order import locality_section, order_section, shuffling_section
from benchmarks.data_remote import data_of_one_rank, remote_section
from benchmarks.machine import describe_machine
from svite_scale.data.decode import decode
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.make.shards import Sample, write_shards
from svite_scale.data.options import AugmentConfig, DataConfig
from svite_scale.data.transforms import keep_a_bit, train_transform
from svite_scale.evaluation.timing import ratio

SIZE, BATCH, POLICY = 224, 32, "rand-m9-mstd0.5-inc1"
OURS, LIMIT = "svite_scale", "limit: decode and augment, no loader"
OTHERS = ("timm wds", "webdataset", "torchvision ImageFolder")


def photographs(count: int) -> list[bytes]:
    """Returns JPEGs of 500 x 375 px, cut at random from two photographs of 640 x 427 px."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        width = int(random.integers(320, 561))
        height = width * 3 // 4
        left, top = int(random.integers(0, 641 - width)), int(random.integers(0, 428 - height))
        content = BytesIO()
        piece = sources[number % 2].resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        piece.save(content, "jpeg", quality=90)
        found.append(content.getvalue())
    return found


def write_images(images: list[bytes], directory: Path) -> None:
    """Writes the same images as shards and as an ImageFolder."""
    samples = [Sample(f"image-{number:05d}", content, "jpg", number % 2) for number, content in enumerate(images)]
    write_shards(samples, directory / "shards", "train", 64)
    for sample in samples:
        folder = directory / "folder" / str(sample.label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample.key}.jpg").write_bytes(sample.image)


def plain_transform() -> Callable[[Image.Image], Tensor]:
    """Returns timm's own transform to uint8, with the same fix of posterize as ours."""
    transform = create_transform(
        SIZE, is_training=True, color_jitter=None, auto_augment=POLICY, interpolation="bicubic", use_prefetcher=True
    )
    return keep_a_bit(transform)


def our_config(directory: Path) -> DataConfig:
    return DataConfig(train=f"{directory}/shards", workers=1, augment=AugmentConfig(recipe="deit", auto_augment=POLICY))


def our_loader(directory: Path, count: int) -> Iterable[object]:
    return data_of_one_rank(our_config(directory), SIZE, BATCH).batches(0, count // BATCH)


def timm_loader(directory: Path, count: int) -> Iterable[object]:
    last = count // 64 - 1
    dataset = create_dataset(
        "wds/", str(directory / "shards"), f"train-{{000000..{last:06d}}}.tar|{count}", is_training=True, batch_size=BATCH
    )
    loader = create_loader(
        dataset,
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        num_workers=1,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    dataset.transform = plain_transform()
    return loader


def webdataset_loader(directory: Path, count: int) -> Iterable[object]:
    shards = sorted(str(path) for path in (directory / "shards").glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(plain_transform(), lambda label: label).batched(BATCH)
    return wds.WebLoader(dataset, num_workers=1, batch_size=None)


def folder_loader(directory: Path, count: int) -> Iterable[object]:
    return DataLoader(ImageFolder(directory / "folder", plain_transform()), BATCH, shuffle=True, num_workers=1)


def without_loader(directory: Path, step: Callable[[bytes], object]) -> Iterable[object]:
    """Applies ``step`` to the images, after it has read all of them into memory."""
    contents = [
        index.path.read_bytes()[offset : offset + length]
        for index in load_indexes(f"{directory}/shards")
        for offset, length in zip(index.offsets.tolist(), index.lengths.tolist(), strict=True)
    ]
    for start in range(0, len(contents), BATCH):
        for content in contents[start : start + BATCH]:
            step(content)
        yield None


def samples_per_second(batches: Iterable[object]) -> float:
    """Returns the speed from the first batch, which waits for the worker's start, to the last."""
    times = [time.perf_counter() for _ in batches]
    return (len(times) - 1) * BATCH / (times[-1] - times[0])


def speed_section(arguments: argparse.Namespace) -> None:
    count = arguments.images // 64 * 64
    ours, plain = train_transform(our_config(Path()), SIZE), plain_transform()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_images(photographs(count), directory)
        contenders: dict[str, Callable[[], Iterable[object]]] = {
            OURS: partial(our_loader, directory, count),
            "timm wds": partial(timm_loader, directory, count),
            "webdataset": partial(webdataset_loader, directory, count),
            "torchvision ImageFolder": partial(folder_loader, directory, count),
            LIMIT: partial(without_loader, directory, lambda content: ours(decode(content, 3))),
            "the same with Pillow and timm": partial(without_loader, directory, lambda content: plain(opened(content))),
            "decode alone": partial(without_loader, directory, lambda content: decode(content, 3)),
            "decode alone, Pillow": partial(without_loader, directory, opened),
        }
        speeds = take_turns(contenders, arguments.rounds)
    best = max(OTHERS, key=lambda name: statistics.median(speeds[name]))
    print(f"\n{'one core, 500 x 375 JPEGs':38} {'samples/s':>10} {'svite_scale / it':>17}")
    for name, values in speeds.items():
        print(f"{name:38} {statistics.median(values):10.0f} {ratio(speeds[OURS], values):17.3f}")
    of_limit, of_best = (ratio(speeds[OURS], speeds[name]) for name in (LIMIT, best))
    print(f"svite_scale is at {of_limit:.3f} of the limit, and {of_best:.3f} times as fast as the best other, {best}")


def opened(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content)).convert("RGB")


def take_turns(contenders: dict[str, Callable[[], Iterable[object]]], rounds: int) -> dict[str, list[float]]:
    """Returns the samples per second of each in each round. A round runs on one core, the next round on the next core."""
    allowed = sorted(os.sched_getaffinity(0))
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        os.sched_setaffinity(0, {allowed[turn % len(allowed)]})  # worker processes inherit it
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            value = samples_per_second(contenders[name]())
            if turn:  # the first round fills caches
                speeds[name].append(value)
    os.sched_setaffinity(0, allowed)
    return speeds


SECTIONS = {
    "speed": speed_section,
    "order": order_section,
    "shuffling": shuffling_section,
    "locality": locality_section,
    "remote": remote_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--images", type=int, default=1280, help="images that a loader reads in one turn; a multiple of 64")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shuffle-shards", type=int, default=64, help="data.shuffle_shards")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    for section in arguments.sections:
        SECTIONS[section](arguments)


if __name__ == "__main__":
    main()
