"""What a checkpoint says of itself, read without running anything that it holds: it may be somebody else's.

``torch.distributed.checkpoint`` reads its ``.metadata`` with ``pickle.load``, which runs whatever the file asks for. Here it is
read as data, of which its own classes are made anew.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what FileSystemReader looks up for each piece it reads
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from svite_scale.checkpoint import plain_pickle
from svite_scale.checkpoint.directory import RUN_STATE
from svite_scale.checkpoint.plain_pickle import Made, Name, PlainPickleError
from svite_scale.errors import CheckpointError

METADATA = ".metadata"
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
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
}
"""All that ``torch.distributed.checkpoint`` names in a checkpoint's metadata, of this version or another."""

FILE = re.compile(r"__\d+_\d+\.distcp")
"""How it names the files that tensors are in, which are all in the checkpoint's directory."""

REMEDY = "restore it, or use another checkpoint"


class TensorReader(dcp.FileSystemReader):
    """Reads a checkpoint that holds tensors and nothing else, for :func:`torch.distributed.checkpoint.load`.

    Pieces of tensors are read by torch with ``weights_only=True``. Other objects, which it would unpickle, are refused.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See the base class.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
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
    """The shapes of the tensors that a checkpoint holds, by name.

    Raises:
        CheckpointError: as :meth:`TensorReader.read_metadata`.
    """
    entries = TensorReader(checkpoint).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """What isn't a tensor.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = checkpoint / RUN_STATE
    try:
        state = json.loads(path.read_text())
        if not all(isinstance(state[name], dict) for name in ("topology", "counts", "optimizer_scalars", "config", "versions")):
            raise TypeError("a section is no mapping")
        if type(state["topology"]["steps"]) is not int or state["topology"]["steps"] < 0:
            raise TypeError("its step is none")
        state["topology"] = _renamed_counters(state["topology"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error!r}); {REMEDY}") from error
    return dict(state)


def _renamed_counters(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The topology's counters by today's names; older checkpoints have others."""
    if "heard_steps" not in saved:
        return dict(saved)
    frozen = [name.removeprefix("frozen/") for name in saved if name.startswith("frozen/")]
    kept = {name: saved[name] for name in ("steps", "last_update", "postponed", "retry_step")}
    return kept | {"recorded_steps": saved["heard_steps"], "recorded_ranks": saved["heard_ranks"], "frozen": frozen}


def _metadata(read: object, most_pieces: int) -> Metadata:
    """Made anew, each part of the kind that it has to be.

    Args:
        read: from the pickle.
        most_pieces: that a pickle of its length may have, unless it repeats one without end.
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
    if not isinstance(dtype, Name) or dtype.dotted not in DTYPES:
        raise PlainPickleError(f"{name} has no dtype")
    size, chunks = _size(state.get("size")), state.get("chunks")
    if not isinstance(chunks, list):
        raise PlainPickleError(f"{name} has no chunks")
    own = [_chunk(chunk) for chunk in chunks]
    if sum(math.prod(chunk.sizes) for chunk in own) != math.prod(size):
        raise PlainPickleError(f"the chunks of {name} don't make up its {math.prod(size)} elements")
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype.dotted]), size, own)


def _chunk(chunk: object) -> ChunkStorageMetadata:
    state = _state(chunk, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(state.get("offsets")), _size(state.get("sizes")))


def _piece(index: object, info: object) -> tuple[MetadataIndex, _StorageInfo]:
    """Where a chunk is."""
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
    """The attributes of an object of a class."""
    wanted = maker if "." in maker else CLASSES + maker
    if not isinstance(read, Made) or read.maker != wanted or not isinstance(read.state, dict):
        found = read.maker if isinstance(read, Made) else type(read).__name__
        raise PlainPickleError(f"it has a {found.rpartition('.')[2]} in place of a {maker.rpartition('.')[2]}")
    return read.state


def _size(read: object) -> torch.Size:
    if not isinstance(read, Made) or read.maker != "torch.Size" or len(read.arguments) != 1:
        raise PlainPickleError("a size is none")
    (numbers,) = read.arguments
    if not isinstance(numbers, tuple):
        raise PlainPickleError("a size is none")
    return torch.Size([_whole(number) for number in numbers])


def _whole(number: object) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise PlainPickleError("a number is none")
    return number


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise PlainPickleError("a name is none")
    return text
