"""Test accuracy on glyphs by size of the blocks in which weights are active, density and method: mean and spread over seeds.

    python launch/make_shards.py --source glyphs --out data/glyphs
    python benchmarks/block_accuracy.py --shards data/glyphs --results results.jsonl [--widths 128 384] [--epochs 2] ...

A ViT of depth 4 with patches of 7 pixels trains on one thread; ``--processes`` runs train at a time. Each finished run is a
line of the results; a run that is there already isn't run again, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from timm.layers import set_fused_attn
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a script

import svite_scale
from benchmarks.machine import describe_machine
from svite_scale.sparsity.layers.base import sparse_layers

NUM_CLASSES, IMAGE_SIZE, PATCH_SIZE, DEPTH, HEAD_SIZE = 36, 28, 7, 4, 32
MEAN, STD = 0.18, 0.355
SHIFT = 2
"""Pixels by which a training image is moved at most, at random."""
EVAL_BATCH = 1000


@dataclass(frozen=True)
class Run:
    """One training run. A seed fixes the weights, the masks, and the order of the data and its augmentation."""

    width: int
    block: str
    """``dense``, or rows and columns: ``16x16``."""
    density: float
    method: str
    seed: int
    epochs: float
    images: int
    """The first images of the training set."""
    batch_size: int
    lr: float
    gain: float
    """Factor of the blocks' initial weights at width 128; the spread falls with the root of the width."""
    updates: int
    """Topology updates in the training."""


def train(run: Run, shards: Path) -> dict[str, Any]:
    """Trains and evaluates one run, and returns its line of the results."""
    torch.set_num_threads(1)
    set_fused_attn(False)  # its backward in bfloat16 takes more than half of a step on a CPU
    torch.manual_seed(run.seed)
    start = time.process_time()
    images, labels = load_split(shards, "train")
    images, labels = images[: run.images], labels[: run.images]
    total_steps = round(run.epochs * (len(images) // run.batch_size))
    model = build_model(run)
    optimizer = torch.optim.AdamW(svite_scale.parameter_groups(model, weight_decay=0.05), lr=run.lr, fused=True)
    warmup = max(1, total_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total_steps)))
    )
    topology = None
    if sparse_layers(model):
        options = svite_scale.TopologyOptions(method=run.method, seed=run.seed)
        update_every = max(1, int(0.8 * total_steps) // run.updates)
        topology = svite_scale.attach(model, optimizer, options=options, total_steps=total_steps, update_every=update_every)
    generator = torch.Generator().manual_seed(run.seed)
    losses = []
    for chosen in batches(len(images), run.batch_size, total_steps, generator):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(augment(images[chosen], generator))
        loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if topology is not None:
            topology.step()
        losses.append(loss.item())
    train_time = time.process_time() - start
    accuracy = evaluate(model, shards)
    return asdict(run) | {
        "accuracy": round(accuracy, 2),
        "train_loss": round(statistics.mean(losses[-50:]), 4),
        "steps": total_steps,
        "core_seconds": round(train_time, 1),
        "eval_core_seconds": round(time.process_time() - start - train_time, 1),
    }


def build_model(run: Run) -> nn.Module:
    """Returns the model, whose initial weights have the spread that suits the width and the density of each layer."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_chans=1,
        num_classes=NUM_CLASSES,
        embed_dim=run.width,
        depth=DEPTH,
        num_heads=run.width // HEAD_SIZE,
    )
    with torch.no_grad():
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(run.gain * math.sqrt(128 / run.width))
    if run.block != "dense":
        rows, columns = map(int, run.block.split("x"))
        for layer in svite_scale.sparsify(model, run.density, block=(rows, columns), seed=run.seed, init="dense"):
            if layer.density < 1:  # ERK keeps small layers dense
                with torch.no_grad():
                    model.get_submodule(layer.name).values.div_(math.sqrt(layer.density))
    return model


def batches(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the positions of each step's images; each epoch has another order."""
    while True:
        for chosen in torch.randperm(count, generator=generator).split(batch_size)[: count // batch_size]:
            if steps == 0:
                return
            steps -= 1
            yield chosen


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns uint8 images ``[B, H, W]`` moved by some pixels, each in its own direction, and normalised ``[B, 1, H, W]``."""
    padded = F.pad(images, (SHIFT,) * 4)
    top, left = torch.randint(2 * SHIFT + 1, (2, len(images), 1), generator=generator)
    rows, columns = torch.arange(images.shape[1]) + top, torch.arange(images.shape[2]) + left
    return normalize(padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]])


def normalize(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN).div_(STD)[:, None]


@torch.inference_mode()
def evaluate(model: nn.Module, shards: Path) -> float:
    """Returns the accuracy on the test images, in percent."""
    images, labels = load_split(shards, "val")
    model.eval()
    correct = 0
    for batch, label in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            correct += int((model(normalize(batch)).argmax(1) == label).sum())
    return 100 * correct / len(labels)


@lru_cache
def load_split(shards: Path, split: str) -> tuple[Tensor, Tensor]:
    """Returns the images of a split, uint8 ``[N, H, W]``, and their labels; decoded once, and then kept in a file."""
    cached = shards / f"{split}-{IMAGE_SIZE}.npz"
    if not cached.exists():
        names = json.loads((shards / "_info.json").read_text())["splits"][split]["filenames"]
        samples = list(webdataset.WebDataset([str(shards / name) for name in names], shardshuffle=False))
        images = np.stack([np.asarray(Image.open(BytesIO(sample["png"]))) for sample in samples])
        np.savez(cached, images=images, labels=np.array([int(sample["cls"]) for sample in samples]))
    loaded = np.load(cached)
    return torch.from_numpy(loaded["images"]), torch.from_numpy(loaded["labels"])


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Prints mean and standard deviation over seeds, one line for each setting."""
    rows = defaultdict(list)
    for result in results:
        rows[tuple(result[key] for key in ("width", "block", "density", "method", "epochs", "images"))].append(result)
    print(
        f"{'width':>5} {'block':>6} {'density':>7} {'method':7} {'epochs':>6} {'images':>6} {'mean':>6} {'std':>5}  each seed"
    )
    for (width, block, density, method, epochs, images), found in rows.items():
        each = [result["accuracy"] for result in found]
        spread = f"{statistics.stdev(each):5.2f}" if len(each) > 1 else "    -"
        setting = f"{width:5} {block:>6} {density:7} {method:7} {epochs:6g} {images:6}"
        print(f"{setting} {statistics.mean(each):6.2f} {spread}  {' '.join(f'{value:5.2f}' for value in each)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 384])
    parser.add_argument("--blocks", nargs="+", default=["dense", "1x1", "4x4", "8x8", "16x1", "32x1", "16x16"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--methods", nargs="+", default=["static", "svite"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--gain", type=float, default=3.16)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    wanted = []
    for seed, width, block, density, method in product(
        arguments.seeds, arguments.widths, arguments.blocks, arguments.densities, arguments.methods
    ):
        if block == "dense":
            density, method = 1.0, "dense"
        options = (arguments.epochs, arguments.images, arguments.batch_size, arguments.lr, arguments.gain, arguments.updates)
        run = Run(width, block, density, method, seed, *options)
        if run not in wanted:
            wanted.append(run)
    print(describe_machine())
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    fields = Run.__dataclass_fields__
    finished = {Run(**{name: result[name] for name in fields}): result for result in map(json.loads, lines)}
    for split in ("train", "val"):
        load_split(arguments.shards, split)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        futures = {pool.submit(train, run, arguments.shards): run for run in wanted if run not in finished}
        for future in as_completed(futures):
            finished[futures[future]] = future.result()
            with arguments.results.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            print(json.dumps(future.result()), file=sys.stderr, flush=True)
    print_table([finished[run] for run in wanted])


if __name__ == "__main__":
    main()
