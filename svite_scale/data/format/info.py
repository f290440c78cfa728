"""``_info.json`` beside shards: which of them make up each split, and its classes.

timm's reader of WebDataset shards finds a split by it: ``ReaderWds(DIR, split="train")``.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from svite_scale.data.format.files import open_regular, replacing
from svite_scale.errors import DataError

NAME = "_info.json"


def write_info(shards: Sequence[Path], counts: Sequence[int], split: str, classes: Sequence[str] | None) -> Path:
    """Adds a split to the file in the folder of its shards, or replaces it.

    Args:
        shards: all of the split, in order.
        counts: samples of each.
        split: its name.
        classes: names of the labels from 0, where they are known.

    Raises:
        DataError: there is a file that holds something else.
    """
    path = shards[0].parent / NAME
    info: dict[str, Any] = {
        "name": split,
        "num_samples": sum(counts),
        "filenames": [shard.name for shard in shards],
        "shard_lengths": list(counts),
    }
    if classes is not None:
        info["classes"] = list(classes)
    with locked(path.parent):
        splits = read_splits(path.parent)
        if splits.get(split) != info:
            splits[split] = info
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"splits": dict(sorted(splits.items()))}) + "\n")
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps the other processes that ask for the same folder waiting, so that none reads what another is about to replace."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems of networks can't lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_classes(folder: Path, split: str, classes: Sequence[str] | None) -> None:
    """Requires that the splits written to ``folder`` so far number the same classes alike.

    Raises:
        DataError: they don't, or what tells of them can't be read.
    """
    for other, info in read_splits(folder).items():
        known = info.get("classes")
        if other != split and classes is not None and known is not None and list(classes) != known:
            raise DataError(
                f"{folder} holds {other} with {len(known)} classes, and {split} has {len(classes)}, not all the same in the "
                "same order, so that labels would disagree; give both the same --classes FILE, or another --out"
            )


def listed_shards(folder: Path) -> list[Path]:
    """All shards that the file in ``folder`` lists; none where there is no such file, or it is of another kind."""
    try:
        splits = read_splits(folder)
    except DataError:
        return []
    return [folder / name for info in splits.values() for name in info.get("filenames", ())]


def read_splits(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / NAME
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
    """Whether what is used of a split, where it is there, is of the right kind."""
    if not isinstance(info, dict):
        return False
    files, classes = info.get("filenames", []), info.get("classes")
    if not isinstance(files, list) or not isinstance(classes, list | None):
        return False
    return all(isinstance(file, str) for file in files)
