"""Chunks of flat tensors, one per rank: cutting and gathering them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

GATHERED_NUMEL = 2**18
"""Elements in one all-gather, of all ranks together."""


def chunk_numel(numel: int, world_size: int) -> int:
    """Returns the elements of the largest chunk."""
    return -(-numel // world_size)


def rank_numel(numel: int, rank: int, world_size: int) -> int:
    """Returns the elements of the rank's :func:`rank_chunk`."""
    size = chunk_numel(numel, world_size)
    return min(max(numel - rank * size, 0), size)


def rank_chunk(full: Tensor, rank: int, world_size: int) -> Tensor:
    """Returns the rank's part of a tensor cut along dimension 0 by :meth:`torch.Tensor.chunk`; empty past the last chunk.

    This is also how ``torch.distributed.tensor.Shard(0)`` cuts.
    """
    chunks = full.chunk(world_size)
    return chunks[rank] if rank < len(chunks) else full[:0]


def padded(tensor: Tensor, numel: int) -> Tensor:
    """Returns a flat tensor with zeros up to ``numel`` elements; the tensor itself if it has as many."""
    return tensor if tensor.numel() == numel else torch.nn.functional.pad(tensor, (0, numel - tensor.numel()))


def gather_chunks(chunk: Tensor, numel: int, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the whole of which each rank holds its :func:`rank_chunk`. A collective.

    Args:
        chunk: this rank's, flat.
        numel: elements of the whole.
        group: the ranks; None for a single one.
    """
    if group is None:
        return chunk
    return gather_equal(padded(chunk, chunk_numel(numel, dist.get_world_size(group))), group)[:numel]


def gather_equal(chunk: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the ranks' flat chunks, all of one size, one after another. A collective."""
    world_size, size = dist.get_world_size(group), chunk.numel()
    full = chunk.new_empty(world_size, size)
    # Piece by piece, because a collective may hold its result once more.
    step = max(GATHERED_NUMEL // world_size, 1)
    for start in range(0, size, step):
        piece = chunk[start : start + step]
        gathered = piece.new_empty(world_size * piece.numel())
        dist.all_gather_into_tensor(gathered, piece, group=group)
        full[:, start : start + piece.numel()] = gathered.view(world_size, -1)
    return full.flatten()


def sharded_tensors(chunks: Mapping[str, tuple[Tensor, int]], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Returns the flat tensors of which each rank holds a :func:`rank_chunk`, as ``DTensor``s of ``Shard(0)``. Local.

    Args:
        chunks: by name, this rank's chunk, and the elements of the whole.
        group: the ranks; None for a single one, whose chunks are returned as they are.
    """
    if group is None or not chunks:
        return {name: chunk for name, (chunk, _) in chunks.items()}
    mesh = DeviceMesh.from_group(group, next(iter(chunks.values()))[0].device.type)
    return {
        name: DTensor.from_local(chunk, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))
        for name, (chunk, numel) in chunks.items()
    }


def own_chunk(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns this rank's chunk of a flat tensor, which is whole or one of :func:`sharded_tensors`; a copy of a whole one's."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return rank_chunk(tensor, *rank_and_size(group)).clone()


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Returns this process's rank and the world size in a group; None is a group of one."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
