"""Reading a checkpoint without running anything in it, because it may be somebody else's.

``torch.distributed.checkpoint`` reads its file ``.metadata`` with ``pickle.load``, which runs any code that the file names.
Here the file is read as data, and torch's objects are built from that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # FileSystemReader needs one per piece
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from svite_scale.checkpoint import plain_pickle
from svite_scale.checkpoint.directory import RUN_STATE, CheckpointDirectory
from svite_scale.checkpoint.plain_pickle import Made, PlainPickleError
from svite_scale.errors import CheckpointError

METADATA = ".metadata"
MODEL, VALUES = "model/", ".values"
"""Beginning and end of the name of a packed layer's active weights."""

CLASSES = "torch.distributed.checkpoint.metadata."
PIECE = "torch.distributed.checkpoint.filesystem._StorageInfo"
DTYPES = {f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
KNOWN = {
    *DTYPES,
    *(
        CLASSES + name
        for name in (
            "Metadata",
            "StorageMeta",
            "MetadataIndex",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    PIECE,
    "builtins.getattr",  # by which Python 3.11.0 to 3.11.3 pickle a member of an enum
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
}
"""All globals that ``torch.distributed.checkpoint`` writes into metadata, in this version or another. None is called."""

FILE = re.compile(r"__\d+_\d+\.distcp")
"""The names that it gives to files of tensors, all in the checkpoint's directory."""

REMEDY = "restore it, or use another checkpoint"


class TensorReader(dcp.FileSystemReader):
    """Reads a checkpoint that holds tensors and nothing else, for :func:`torch.distributed.checkpoint.load`.

    Torch reads the tensors' pieces with ``weights_only=True``. Other objects, which torch would unpickle, are refused.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the metadata, built from plain data.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something unexpected.
        """
        path = Path(self.path) / METADATA
        try:
            content = path.read_bytes()
            metadata = _metadata(plain_pickle.load(content, KNOWN), most_pieces=len(content))
        except (OSError, PlainPickleError) as error:
            raise CheckpointError(f"{path} can't be read: {error}; {REMEDY}") from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def saved_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """Returns the shapes of the tensors in a checkpoint, by name.

    Raises:
        CheckpointError: as :meth:`TensorReader.read_metadata`.
    """
    entries = TensorReader(checkpoint).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def saved_counts(checkpoint: Path) -> dict[str, int]:
    """Returns the number of active weights of each layer that is packed by weights in a checkpoint, by name.

    Raises:
        CheckpointError: as :meth:`TensorReader.read_metadata`.
    """
    values = {name: size.numel() for name, size in saved_sizes(checkpoint).items() if name.endswith(VALUES)}
    return {name.removeprefix(MODEL).removesuffix(VALUES): count for name, count in values.items() if name.startswith(MODEL)}


def counts_of_run(checkpoints: Path) -> dict[str, int] | None:
    """Returns the :func:`saved_counts` of a run, which are those of each of its checkpoints. Local.

    Args:
        checkpoints: the run's directory of checkpoints.

    Returns:
        None if no checkpoint is there whose metadata can be read.
    """
    with suppress(OSError):
        for path in CheckpointDirectory(checkpoints).named():
            with suppress(CheckpointError):
                return saved_counts(path)
    return None


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Returns everything in a checkpoint that isn't a tensor: ``step``, ``topology``, ``counts``, ``optimizer_scalars``,
    ``config``, ``versions``, and ``samples`` if it names them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = checkpoint / RUN_STATE
    try:
        state = json.loads(path.read_text())
        if not all(isinstance(state[name], dict) for name in ("topology", "counts", "optimizer_scalars", "config", "versions")):
            raise TypeError("a section is no mapping")
        # Older checkpoints have the step among the topology's counters only.
        step = state.setdefault("step", state["topology"]["steps"])
        if type(step) is not int or step < 0 or step != state["topology"]["steps"]:
            raise TypeError("its step is none")
        state["topology"] = _renamed_counters(state["topology"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error!r}); {REMEDY}") from error
    return dict(state)


def _renamed_counters(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the topology's counters by today's names. Older checkpoints have others."""
    if "heard_steps" not in saved:
        return dict(saved)
    frozen = [name.removeprefix("frozen/") for name in saved if name.startswith("frozen/")]
    kept = {name: saved[name] for name in ("steps", "last_update", "postponed", "retry_step")}
    return kept | {"recorded_steps": saved["heard_steps"], "recorded_ranks": saved["heard_ranks"], "frozen": frozen}


def _metadata(read: object, most_pieces: int) -> Metadata:
    """Builds the metadata, and checks the type of each part.

    Args:
        read: what the pickle holds.
        most_pieces: upper bound of the number of pieces. A pickle may refer to one piece many times, without end.
    """
    state = _state(read, "Metadata")
    tensors, pieces = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(pieces, dict):
        raise PlainPickleError("it lists no tensors")
    made: dict[str, TensorStorageMetadata] = {}
    for name, entry in tensors.items():
        made[_text(name)] = _tensor(name, entry)
        most_pieces -= len(made[name].chunks)
        if most_pieces < 0:
            raise PlainPickleError("it has more pieces than it can hold")
    storage = dict(_piece(index, info) for index, info in pieces.items())
    return Metadata(state_dict_metadata=made, storage_data=storage)  # type: ignore[arg-type]  # dict is invariant


def _tensor(name: str, entry: object) -> TensorStorageMetadata:
    state = _state(entry, "TensorStorageMetadata")
    properties = state.get("properties")
    if not isinstance(properties, Made) or properties.maker != f"{CLASSES}TensorProperties":
        raise PlainPickleError(f"{name} has no properties")
    # The others are torch's defaults, and nobody looks at them.
    dtype = properties.state[0] if isinstance(properties.state, tuple) and properties.state else None
    if not isinstance(dtype, type) or not issubclass(dtype, Made) or dtype.maker not in DTYPES:
        raise PlainPickleError(f"{name} has no dtype")
    size, chunks = _size(state.get("size")), state.get("chunks")
    if not isinstance(chunks, list):
        raise PlainPickleError(f"{name} has no chunks")
    states = [_state(chunk, "ChunkStorageMetadata") for chunk in chunks]
    own = [ChunkStorageMetadata(_size(state.get("offsets")), _size(state.get("sizes"))) for state in states]
    if sum(math.prod(chunk.sizes) for chunk in own) != math.prod(size):
        raise PlainPickleError(f"the chunks of {name} don't make up its {math.prod(size)} elements")
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype.maker]), size, own)


def _piece(index: object, info: object) -> tuple[MetadataIndex, _StorageInfo]:
    """Returns the place of a chunk."""
    key, place = _state(index, "MetadataIndex"), _state(info, PIECE)
    path = _text(place.get("relative_path"))
    if not FILE.fullmatch(path):
        raise PlainPickleError(f"a tensor is in {path[:100]!r}, which is no file of a checkpoint")
    if place.get("transform_descriptors"):
        raise PlainPickleError("its tensors are transformed, which no run does")
    offset = None if key.get("offset") is None else _size(key["offset"])
    number = None if key.get("index") is None else _whole(key["index"])
    return MetadataIndex(_text(key.get("fqn")), offset, number), _StorageInfo(
        path, _whole(place.get("offset")), _whole(place.get("length"))
    )


def _state(read: object, maker: str) -> Mapping[str, Any]:
    """Returns the attributes of an object, which must be of a class."""
    wanted = maker if "." in maker else CLASSES + maker
    if not isinstance(read, Made) or read.maker != wanted or not isinstance(read.state, dict):
        found = read.maker if isinstance(read, Made) else type(read).__name__
        raise PlainPickleError(f"it has a {found.rpartition('.')[2]} in place of a {maker.rpartition('.')[2]}")
    return read.state


def _size(read: object) -> torch.Size:
    arguments = read.arguments if isinstance(read, Made) and read.maker == "torch.Size" else ()
    if len(arguments) != 1 or not isinstance(arguments[0], tuple):
        raise PlainPickleError("a size is none")
    return torch.Size([_whole(number) for number in arguments[0]])


def _whole(number: object) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise PlainPickleError("a number is none")
    return number


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise PlainPickleError("a name is none")
    return text
