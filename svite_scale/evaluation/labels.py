"""The labels that an evaluation accepts: those of the shards, or of a file; and the labels that a model's classes stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svite_scale.data.format.files import open_regular
from svite_scale.data.format.index import ShardIndex
from svite_scale.data.format.patterns import largest_label
from svite_scale.errors import ConfigError, DataError

IMAGENET_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
"""The number of an image in the name of its file, as ImageNet's validation images are named."""

OUR_NUMBER = re.compile(r"\d{8}-")
"""The start of a key in shards that launch/make_shards.py wrote from a folder; the name of the file follows."""

NO_LABEL = -1


@dataclass(frozen=True)
class Labels:
    """The accepted labels of each evaluation sample, from 0 to ``num_labels - 1``.

    Attributes:
        num_labels: L.
        of_class: int64 ``[classes]``, the label that each class of the model stands for, or :data:`NO_LABEL`; None if the
            classes are the labels.
        of_sample: the accepted labels of each sample, perhaps none; None if the shards have the labels.
    """

    num_labels: int
    of_class: Tensor | None = None
    of_sample: Sequence[Sequence[int]] | None = None

    def map_logits(self, logits: Tensor) -> Tensor:
        """Returns the logits of the labels ``[B, L]``, from those of the classes ``[B, classes]``.

        A label that several classes stand for gets the highest of their logits, a label without a class minus infinity.
        """
        if self.of_class is None:
            return logits
        kept = self.of_class != NO_LABEL
        labels = self.of_class[kept].to(logits.device).expand(len(logits), -1)
        mapped = torch.full((len(logits), self.num_labels), -torch.inf, device=logits.device)
        return mapped.scatter_reduce(1, labels, logits[:, kept.to(logits.device)], "amax")

    def accepted(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Returns the accepted labels of a batch, bool ``[B, L]``, on the CPU. They are none if no class stands for the label.

        Args:
            samples: int64 ``[B]``, numbers of the samples.
            labels: int64 ``[B]``, their labels in the shards.
        """
        if self.of_sample is None:
            accepted = labels.unsqueeze(1) == torch.arange(self.num_labels)
        else:
            accepted = torch.zeros(len(samples), self.num_labels, dtype=torch.bool)
            for row, sample in enumerate(samples.tolist()):
                accepted[row, list(self.of_sample[sample])] = True
        if self.of_class is not None:
            known = torch.zeros(self.num_labels, dtype=torch.bool)
            known[self.of_class[self.of_class != NO_LABEL]] = True
            accepted &= known
        return accepted


def read_labels(
    indexes: Sequence[ShardIndex], num_classes: int, labels_file: Path | None = None, map_file: Path | None = None
) -> Labels:
    """Returns the accepted labels of the samples of shards. Local.

    Args:
        indexes: of the shards, in order.
        num_classes: of the model.
        labels_file: JSON, accepted labels by sample; see :func:`labels_of_samples`.
        map_file: labels by class of the model; see :func:`read_label_map`.

    Raises:
        DataError: a file can't be used.
        ConfigError: the model has too few classes for the labels of the shards.
    """
    of_class = None if map_file is None else read_label_map(map_file, num_classes)
    num_labels = num_classes if of_class is None else int(of_class.max()) + 1
    if labels_file is not None:
        keys = [key for index in indexes for key in index.keys]
        return Labels(num_labels, of_class, labels_of_samples(labels_file, keys, num_labels))
    largest, sample = largest_label(indexes)
    if largest >= num_labels and of_class is None:
        problem = f"is too few for labels 0 to {largest}, which is that of {sample}"
        remedy = "evaluate on the classes that the model was trained for, or give a --label-map"
        raise ConfigError("model.num_classes", num_classes, problem, remedy)
    return Labels(num_labels, of_class)


def read_label_map(path: Path, num_classes: int) -> Tensor:
    """Returns the label that each class of a model stands for, int64 ``[classes]``; :data:`NO_LABEL` for none.

    The file is a JSON list with one entry per class, a label or null; or it has one class a line, and the first line is that of
    label 0, as in timm's ``imagenet_r_indices.txt``.

    Raises:
        DataError: it can't be read, or is neither.
    """
    text = read_text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if isinstance(entries, list):
        if len(entries) != num_classes:
            raise DataError(f"{path} has {len(entries)} entries for {num_classes} classes; give one per class of the model")
        labels = [NO_LABEL if entry is None else entry for entry in entries]
        if any(type(label) is not int or label < NO_LABEL for label in labels) or max(labels, default=NO_LABEL) < 0:
            raise DataError(f"{path} isn't a list of labels; write for each class of the model a whole number from 0, or null")
        return torch.tensor(labels)
    lines = text.split()
    classes = [int(line) for line in lines if line.isdecimal() and int(line) < num_classes]
    if not lines or len(classes) != len(lines) or len(set(classes)) != len(classes):
        problem = f"is neither a JSON list nor lines of a class of the model each, 0 to {num_classes - 1}"
        raise DataError(f"{path} {problem}; write the class that stands for label 0 into the first line, and so on")
    labels_of = torch.full((num_classes,), NO_LABEL)
    labels_of[classes] = torch.arange(len(classes))
    return labels_of


def labels_of_samples(path: Path, keys: Sequence[str], num_labels: int) -> list[list[int]]:
    """Returns the accepted labels of each sample, perhaps none.

    The file is JSON. A mapping has them by the name of the sample's image, or by its key in the shard. A list, such as
    ImageNet-ReaL's ``real.json``, has them by the number in the names of ImageNet's validation images: its first entry is that
    of ``ILSVRC2012_val_00000001``. Each entry is a list of labels, or one label.

    Args:
        path: of the file.
        keys: of the samples, in order.
        num_labels: labels are below it.

    Raises:
        DataError: the file can't be read, or has no entry for a sample, or an entry isn't labels.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); give a list or a mapping of lists of labels") from error
    if isinstance(content, list):
        entries = [content_of_number(path, content, key) for key in keys]
    elif isinstance(content, dict):
        by_stem = {Path(name).stem: entry for name, entry in content.items()}
        entries = [content_of_name(path, by_stem, key) for key in keys]
    else:
        raise DataError(f"{path} is neither a list nor a mapping; give a list or a mapping of lists of labels")
    labels = [entry if isinstance(entry, list) else [entry] for entry in entries]
    for key, own in zip(keys, labels, strict=True):
        if any(type(label) is not int or not 0 <= label < num_labels for label in own):
            problem = f"has {str(own)[:40]} for sample {key!r}, but labels are whole numbers from 0 to {num_labels - 1}"
            raise DataError(f"{path} {problem}; correct it")
    return labels


def content_of_number(path: Path, entries: Sequence[Any], key: str) -> Any:
    """Returns a sample's entry in a list, by the number in its key."""
    found = IMAGENET_NUMBER.search(key)
    if found is None:
        raise DataError(
            f"{path} is a list, which is matched by names as ILSVRC2012_val_00000001, but a sample is called {key!r}; write a "
            "mapping from the names of the images to lists of labels instead"
        )
    number = int(found[1])
    if not 1 <= number <= len(entries):
        raise DataError(f"{path} has {len(entries)} entries, so none for sample {key!r}; give the list of all images")
    return entries[number - 1]


def content_of_name(path: Path, entries: Mapping[str, Any], key: str) -> Any:
    """Returns a sample's entry in a mapping from names without extension."""
    stem = Path(key).name
    for name in (stem, OUR_NUMBER.sub("", stem, count=1)):
        if name in entries:
            return entries[name]
    raise DataError(f"{path} has no entry for sample {key!r}; add one, or an empty list to leave the sample out")


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        DataError: it can't be read.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); give a text file in UTF-8") from error
