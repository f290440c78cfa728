"""Masks of layers from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svite_scale.errors import SparsifyError
from svite_scale.sparsity.block_grid import BlockGrid

SUFFIX = ".weight"
NO_MASKS = ("C64", "F4", "F6_E2M3", "F6_E3M2")
"""safetensors' dtypes that have no 0 and 1 of their own, one to an element."""


class MaskFile:
    """A safetensors file with one tensor per layer, named and shaped like the layer's weight in the dense state dict.

    A tensor is bool, or of any real dtype holding only 0 and 1; active is 1. Where weights come in blocks, all weights of a
    block are 0, or all are 1. One tensor at a time is in memory.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Opens the file, and keeps nothing but its tensors' names.

        Raises:
            SparsifyError: it can't be read.
        """
        self.path = fspath(path)
        try:
            with safe_open(self.path, "pt") as file:
                self._names = set(file.keys())
        except FileNotFoundError as error:
            raise self._error("is no file", "check the path") from error
        except (OSError, SafetensorError) as error:
            problem = f"can't be read as safetensors ({error})"
            raise self._error(problem, "write it with safetensors.torch.save_file") from error

    def counts(self, grids: Mapping[str, BlockGrid]) -> dict[str, int]:
        """Returns the numbers of active blocks.

        Args:
            grids: of the weight of each prunable layer.

        Raises:
            SparsifyError: tensors and layers don't fit together one to one, or a tensor is no mask.
        """
        for name in grids:
            if name + SUFFIX not in self._names:
                raise self._error(f"has no tensor {name}{SUFFIX}", f"add it, or list {name} in keep_dense")
        unknown = sorted(self._names - {name + SUFFIX for name in grids})
        if unknown:
            raise self._error(
                f"its tensor {unknown[0]} is of no prunable layer",
                "remove it, and name tensors LAYER.weight, of no layer in keep_dense",
            )
        return {name: int(self.read(name, grid).sum()) for name, grid in grids.items()}

    def read(self, name: str, grid: BlockGrid) -> Tensor:
        """Reads one layer's mask, bool ``[N]`` on the CPU.

        Args:
            name: of the layer.
            grid: of its weight, N blocks.

        Raises:
            SparsifyError: the tensor's shape is another, it holds something else than 0 and 1, no weight is active, or a block
                is active in part.
        """
        with safe_open(self.path, "pt") as file:
            stored = file.get_slice(name + SUFFIX)
            found = tuple(stored.get_shape())
            if found != grid.shape:
                raise self._error(f"its tensor {name}{SUFFIX} is of shape {found}", f"use the weight's, {tuple(grid.shape)}")
            if stored.get_dtype() in NO_MASKS:
                raise self._error(f"its tensor {name}{SUFFIX} is of dtype {stored.get_dtype()}", "save it as torch.bool")
            numbers = file.get_tensor(name + SUFFIX).flatten().double()
        active = numbers == 1
        if not (active | (numbers == 0)).all():
            raise self._error(f"its tensor {name}{SUFFIX} holds something else than 0 and 1", "save it as torch.bool")
        if not active.any():
            raise self._error(
                f"its tensor {name}{SUFFIX} has no active weight", "set at least one, since no layer can be empty"
            )
        blocks = grid.to_blocks(active).flatten(1)
        if not torch.equal(blocks.any(dim=1), blocks.all(dim=1)):
            block = list(grid.block)
            raise self._error(f"its tensor {name}{SUFFIX} has blocks of {block} that are active in part", "set whole blocks")
        return blocks.any(dim=1)

    def _error(self, problem: str, remedy: str) -> SparsifyError:
        return SparsifyError("masks", self.path, problem, remedy)
