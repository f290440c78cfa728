"""The evaluation command: from arguments to files and an exit status."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist

from svite_scale.config.validate import check_normalisation
from svite_scale.data.format.files import replacing
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.format.info import read_splits
from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.errors import ConfigError, DataError, RunError
from svite_scale.evaluation.labels import read_labels
from svite_scale.evaluation.picture import draw_confusion
from svite_scale.evaluation.results import Results, collect_results
from svite_scale.evaluation.subject import ON_CPU, Subject, place, subject_of_export, subject_of_run, subject_of_state_dict
from svite_scale.evaluation.throughput import BATCHES, measure_throughput, table
from svite_scale.runtime import ranks
from svite_scale.runtime.world import World
from svite_scale.train.command import run_on_every_rank
from svite_scale.train.messages import device_name

MOST_LABELS = 4096
"""Labels of the largest confusion matrix, which has as many rows and columns."""


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/evaluate.py``. Every rank calls it.

    Args:
        arguments: ``run``, ``weights``, ``checkpoint``, ``ema``, ``model``, ``config``, ``trust``, ``labels``, ``label_map``,
            ``throughput``, ``out``, ``overrides``.

    Returns:
        The exit status: 0; 2 after a mistake in the config or the arguments; 1 after any other error. The error is printed.
    """

    def command(world: World, _: object) -> int:
        subject = find_subject(arguments)
        out: Path = arguments.out or default_folder(subject, arguments)
        device = torch.device("cpu") if subject.form in ON_CPU else ranks.local_device(world)
        if arguments.throughput is None:
            evaluate(subject, world, device, arguments.labels, arguments.label_map, out)
        else:
            time_inference(subject, world, device, arguments.throughput or BATCHES, out)
        if world.is_main:
            print(f"results are in {out}", file=sys.stderr)
        return 0

    return run_on_every_rank(command)


def find_subject(arguments: argparse.Namespace) -> Subject:
    """Returns the model that the arguments name, and the options to evaluate it with.

    Raises:
        ConfigError, RunError, CheckpointError, ExportError: it can't be read or used.
    """
    path, overrides = arguments.weights, arguments.overrides
    if path is None:
        return subject_of_run(arguments.run, arguments.checkpoint, overrides, ema=arguments.ema)
    if arguments.model is None and arguments.config is None:
        return subject_of_export(path, overrides, trusted=arguments.trust)
    return subject_of_state_dict(path, arguments.model, arguments.config, overrides)


def default_folder(subject: Subject, arguments: argparse.Namespace) -> Path:
    """Returns the folder for results if ``--out`` names none.

    With other labels or options than the run's own, it is beside the folder of the run's own evaluation, so that the model card
    and the report don't take the results for that.
    """
    has_own_setting = arguments.labels is arguments.label_map is None and not arguments.overrides
    is_own = arguments.run is None or has_own_setting
    return subject.out if is_own else subject.out.with_name(f"{subject.out.name}-other")


def evaluate(
    subject: Subject, world: World, device: torch.device, labels_file: Path | None, map_file: Path | None, out: Path
) -> None:
    """Evaluates a model; the main rank writes and prints the results. A collective, which starts and ends the process group.

    Raises:
        ConfigError, DataError: the data, or a file of labels, can't be used.
        RunError: the folder can't be written.
    """
    config, model = subject.config, subject.config.model
    check_normalisation("data", config.data.mean, config.data.std, model.in_channels)
    image_shape = (model.in_channels, model.image_size, model.image_size)
    data = EvalData(config.data, image_shape=image_shape, batch_size=config.train.eval_batch_size, world=world)
    labels = read_labels(data.indexes, model.num_classes, labels_file, map_file)
    transform = DeviceTransform(config.data, model.num_classes, device, training=False)
    forward = place(subject.model, config, device)
    if world.is_main:  # a folder that can't be written is known before the work, not after it
        write_files(out, {})
    ranks.start(world, device)
    started = time.perf_counter()
    results = collect_results(forward, data, transform, labels, device, is_main=world.is_main)
    seconds = time.perf_counter() - started
    if world.is_main:
        found = {
            **results.summary(),
            "samples_per_second": data.num_samples / seconds,
            **subject.facts,
            "data": config.data.val,
            "labels": labels_file and str(labels_file),
            "label_map": map_file and str(map_file),
            "precision": config.train.precision,
            "world_size": world.size,
            "device": device_name(device),
        }
        print(json.dumps(found, indent=2))
        write_files(out, {**details(results, class_names(data.indexes, results.num_labels)), "evaluation.json": to_json(found)})
    # All ranks together: when one has left, some launchers end the others.
    dist.barrier()
    ranks.stop()


def time_inference(subject: Subject, world: World, device: torch.device, batches: Sequence[int], out: Path) -> None:
    """Times a model beside its dense twin, and writes and prints the throughput.

    Raises:
        ConfigError: there are several ranks, or a batch size is below 1.
        RunError: the folder can't be written.
    """
    if world.size > 1:
        raise ConfigError("--throughput", list(batches), "times one process", "start it by plain python")
    if min(batches) < 1:
        raise ConfigError("--throughput", list(batches), "has a batch size below 1", "use at least 1")
    write_files(out, {})
    found = measure_throughput(subject, batches, device)
    facts = {**subject.facts, "precision": subject.config.train.precision, "device": device_name(device)}
    print(table(found))
    write_files(out, {"throughput.json": to_json({**facts, "threads": torch.get_num_threads(), "batches": found})})


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


def details(results: Results, names: Sequence[str] | None) -> dict[str, bytes]:
    """Returns the files of results by class, by name: a table twice, and a picture of the confusion."""
    per_class, text = results.per_class(names), StringIO()
    rows = csv.DictWriter(text, fieldnames=list(per_class[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(per_class)
    files = {"per_class.json": to_json(per_class), "per_class.csv": text.getvalue().encode()}
    if results.num_labels <= MOST_LABELS:
        files["confusion.png"] = draw_confusion(results.confusion(), names)
    return files


def to_json(content: object) -> bytes:
    return f"{json.dumps(content, indent=2)}\n".encode()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files, in order, into a folder, which is made if missing.

    Raises:
        RunError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(folder / name) as path:
                path.write_bytes(content)
    except OSError as error:
        raise RunError(f"can't write to {folder} ({error}); give --out a folder that can be written") from error
