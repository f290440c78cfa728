"""Weights in the published sparse-bitmask layout, for files that other programs read: active values, and a bitmask by rows.

A matrix ``M.weight`` of shape [R, C] is four tensors:

- ``M.shape``: int64 ``[2]``, R and C;
- ``M.compressed``: ``[nnz]``, the active values, row by row;
- ``M.bitmask``: uint8 ``[R, ceil(C / 8)]``; bit i of byte j in a row is column 8j + i, and the bits past C are 0;
- ``M.row_offsets``: int64 ``[R]``, the number of active values before each row.

A convolution's weight ``[out, in, height, width]`` is stored as the matrix [out, in * height * width]. An active value may be
0, as those are that were just grown; so the bitmask, and not the values, says what is active.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from svite_scale.sparsity import bits


class BitmaskMatrix(NamedTuple):
    """A matrix in the layout; its fields are the tensors that the module describes, by the ends of their names."""

    shape: Tensor
    compressed: Tensor
    bitmask: Tensor
    row_offsets: Tensor


def encode(weight: Tensor, active: Tensor) -> BitmaskMatrix:
    """Encodes a weight.

    Args:
        weight: ``[R, ...]``, of any dtype; all dimensions after the first are one.
        active: bool, of the same shape.
    """
    weight, active = weight.flatten(1), active.flatten(1)
    rows, columns = weight.shape
    counts = active.sum(dim=1)
    whole_bytes = torch.nn.functional.pad(active, (0, -columns % 8))
    return BitmaskMatrix(
        shape=torch.tensor([rows, columns]),
        compressed=weight[active],
        bitmask=bits.pack(whole_bytes.flatten()).view(rows, -1),
        row_offsets=counts.cumsum(0) - counts,
    )


def decode(matrix: BitmaskMatrix) -> tuple[Tensor, Tensor]:
    """Decodes a matrix, which may come from anybody.

    Returns:
        The weight ``[R, C]``, 0 where inactive, and bool ``[R, C]``, where it is active.

    Raises:
        ValueError: the tensors don't fit each other.
    """
    shape, compressed, bitmask, row_offsets = matrix
    if shape.dtype != torch.int64 or shape.shape != (2,) or min(shape.tolist()) < 1:
        raise ValueError("shape isn't int64 [2], rows and columns")
    rows, columns = shape.tolist()
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, bits.num_bytes(columns)):
        raise ValueError(f"bitmask isn't uint8 [{rows}, {bits.num_bytes(columns)}]")
    whole_bytes = bits.unpack(bitmask.flatten(), bitmask.numel() * 8).view(rows, -1)
    active = whole_bytes[:, :columns]
    counts = active.sum(dim=1)
    if whole_bytes[:, columns:].any():
        raise ValueError("bitmask has bits past the last column")
    if compressed.shape != (int(counts.sum()),):
        raise ValueError(f"compressed is {list(compressed.shape)}, but bitmask has {int(counts.sum())} active values")
    if row_offsets.dtype != torch.int64 or not torch.equal(row_offsets, counts.cumsum(0) - counts):
        raise ValueError("row_offsets aren't the numbers of active values before each row")
    weight = compressed.new_zeros(rows, columns)
    weight[active] = compressed
    return weight, active


def encode_state_dict(state: Mapping[str, Tensor], active: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encodes the sparse weights of a dense state dict; all other tensors stay as they are.

    Args:
        state: dense, by name.
        active: by the name of a sparse weight, ``M.weight``, bool of its shape.
    """
    encoded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in active:
            matrix = encode(tensor, active[name])
            encoded |= {f"{name.removesuffix('weight')}{end}": part for end, part in matrix._asdict().items()}
        else:
            encoded[name] = tensor
    return encoded


def decode_state_dict(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Decodes what :func:`encode_state_dict` returns, from anybody's file.

    Returns:
        The dense state dict, in which convolutions' weights are matrices; and by the name of each sparse weight, bool
        ``[R, C]``, where it is active.

    Raises:
        ValueError: tensors are missing, or don't fit each other; names the weight.
    """
    state, active = dict(tensors), {}
    for name in tensors:
        if name.endswith(".bitmask"):
            prefix = name.removesuffix("bitmask")
            try:
                matrix = BitmaskMatrix(*(state.pop(f"{prefix}{end}") for end in BitmaskMatrix._fields))
                state[f"{prefix}weight"], active[f"{prefix}weight"] = decode(matrix)
            except KeyError as error:
                raise ValueError(f"{error.args[0]} is missing") from error
            except ValueError as error:
                raise ValueError(f"{prefix}weight: {error}") from error
    return state, active
