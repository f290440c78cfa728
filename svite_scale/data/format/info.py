"""``_info.json`` beside shards, which lists the shards and classes of each split.

timm's reader of WebDataset shards finds a split by it: ``ReaderWds(DIR, split="train")``.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from svite_scale.data.format.files import open_regular, replacing
from svite_scale.errors import DataError

INFO_NAME = "_info.json"


def write_info(
    shards: Sequence[Path],
    counts: Sequence[int],
    split: str,
    classes: Sequence[str] | None,
    details: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Adds a split to ``_info.json`` in the folder of its shards, or replaces it, and returns the path.

    Args:
        shards: all of the split, in order.
        counts: samples of each.
        split: its name.
        classes: names of the labels from 0, if they are known.
        details: other fields of the split, for JSON.

    Raises:
        DataError: the file there holds something else.
    """
    path = shards[0].parent / INFO_NAME
    info: dict[str, Any] = {
        "name": split,
        "num_samples": sum(counts),
        "filenames": [shard.name for shard in shards],
        "shard_lengths": list(counts),
        **details,
    }
    if classes is not None:
        info["classes"] = list(classes)
    with locked_folder(path.parent):
        splits = read_splits(path.parent)
        if splits.get(split) != info:
            splits[split] = info
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"splits": dict(sorted(splits.items()))}) + "\n")
    return path


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, for which other processes wait, so that none reads a file that another will replace."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems can't lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_classes(folder: Path, split: str, classes: Sequence[str] | None) -> None:
    """Checks that the other splits in ``folder`` have the same classes in the same order.

    Raises:
        DataError: they haven't, or ``_info.json`` can't be read.
    """
    for other, info in read_splits(folder).items():
        known = info.get("classes")
        if other != split and classes is not None and known is not None and list(classes) != known:
            raise DataError(
                f"{folder} holds {other} with {len(known)} classes, and {split} has {len(classes)}, not all the same in the "
                "same order, so that labels would disagree; give both the same --classes FILE, or another --out"
            )


def listed_shards(folder: Path) -> list[Path]:
    """Returns all shards that ``_info.json`` in ``folder`` lists; none if there is no such file, or it holds something else."""
    try:
        splits = read_splits(folder)
    except DataError:
        return []
    return [folder / name for info in splits.values() for name in info.get("filenames", ())]


def read_splits(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INFO_NAME
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            splits = dict(json.load(file)["splits"])
        if all(is_split(info) for info in splits.values()):
            return splits
        problem = "a split is no mapping, or its filenames or classes are no list"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = repr(error)
    raise DataError(f"{path} is not a list of splits ({problem}); move it away, and it will be written again")


def is_split(info: object) -> bool:
    """Tests whether the fields of a split that are used here, where present, have the right types."""
    if not isinstance(info, dict):
        return False
    files, classes = info.get("filenames", []), info.get("classes")
    if not isinstance(files, list) or not isinstance(classes, list | None):
        return False
    return all(isinstance(file, str) for file in files)
