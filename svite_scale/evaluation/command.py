"""The evaluation command: from arguments to files and an exit status."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from svite_scale.data.format.files import replacing
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.format.info import read_splits
from svite_scale.data.format.patterns import largest_label
from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.errors import ConfigError, DataError, RunError
from svite_scale.evaluation.picture import draw_confusion
from svite_scale.evaluation.results import Results, collect_results
from svite_scale.evaluation.subject import place, subject_of_run
from svite_scale.runtime import ranks
from svite_scale.runtime.ending import Failure
from svite_scale.runtime.world import World
from svite_scale.train.command import run_on_every_rank

MOST_LABELS = 4096
"""Labels of the largest confusion matrix, which has as many rows and columns."""


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/evaluate.py``. Every rank calls it.

    Args:
        arguments: ``run``, ``checkpoint``, ``ema``, ``out``, ``overrides``.

    Returns:
        The exit status: 0; 2 after a mistake in the config or the arguments; 1 after any other error. The error is printed.
    """
    return run_on_every_rank(lambda world, failure: evaluate(arguments, world, failure))


def evaluate(arguments: argparse.Namespace, world: World, failure: Failure) -> int:
    """Evaluates the model that the arguments name; the main rank writes and prints the results. A collective.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError, RunError, CheckpointError, DataError: something that the arguments name can't be used.
    """
    subject = subject_of_run(arguments.run, arguments.checkpoint, arguments.overrides, ema=arguments.ema)
    config, device = subject.config, ranks.local_device(world)
    model = config.model
    image_shape = (model.in_channels, model.image_size, model.image_size)
    data = EvalData(config.data, image_shape=image_shape, batch_size=config.train.eval_batch_size, world=world)
    check_labels(data.indexes, model.num_classes)
    ranks.start(world, device)
    transform = DeviceTransform(config.data, model.num_classes, device, training=False)
    forward = place(subject.model, config, device)
    started = time.perf_counter()
    results = collect_results(forward, data, transform, model.num_classes, device, is_main=world.is_main)
    samples_per_second = data.num_samples / (time.perf_counter() - started)
    if world.is_main:
        found = {
            **results.summary(),
            "samples_per_second": samples_per_second,
            **subject.facts,
            "data": config.data.val,
            "precision": config.train.precision,
            "world_size": world.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        out = arguments.out or subject.out
        write_results(out, found, results, class_names(data.indexes, results.num_labels))
        print(json.dumps(found, indent=2))
        print(f"results are in {out}", file=sys.stderr)
    # All ranks together: when one has left, some launchers end the others.
    dist.barrier()
    ranks.stop()
    return 0


def check_labels(indexes: Sequence[ShardIndex], num_labels: int) -> None:
    """Checks that the model has a class for each label.

    Raises:
        ConfigError: it hasn't.
    """
    largest, sample = largest_label(indexes)
    if largest >= num_labels:
        problem = f"is too few for labels 0 to {largest}, which is that of {sample}"
        raise ConfigError("model.num_classes", num_labels, problem, "evaluate on the classes that the model was trained for")


def class_names(indexes: Sequence[ShardIndex], num_labels: int) -> list[str] | None:
    """Returns the names of the labels, as ``_info.json`` beside the shards has them; None if it doesn't."""
    first = indexes[0].path
    if not isinstance(first, Path):
        return None
    try:
        splits = read_splits(first.parent).values()
    except DataError:
        return None
    names: list[str] = next((info.get("classes", []) for info in splits if first.name in info.get("filenames", ())), [])
    return [str(name) for name in names] if len(names) == num_labels else None


def write_results(folder: Path, found: Mapping[str, Any], results: Results, names: Sequence[str] | None) -> None:
    """Writes the files of an evaluation, ``evaluation.json`` last.

    Args:
        folder: to write to; made if missing.
        found: content of ``evaluation.json``.
        results: of all samples.
        names: of the labels, if they have names.

    Raises:
        RunError: the folder can't be written.
    """
    per_class = results.per_class(names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "per_class.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(per_class[0]))
            writer.writeheader()
            writer.writerows(per_class)
        if results.num_labels <= MOST_LABELS:
            with replacing(folder / "confusion.png") as path:
                path.write_bytes(draw_confusion(results.confusion(), names))
        for name, content in (("per_class.json", per_class), ("evaluation.json", found)):
            with replacing(folder / name) as path:
                path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"can't write to {folder} ({error}); give --out a folder that can be written") from error
