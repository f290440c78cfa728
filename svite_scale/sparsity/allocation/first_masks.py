"""First masks of layers that aren't drawn: from a file, from the zeros of weights, or of a checkpoint's counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from svite_scale.errors import SparsifyError
from svite_scale.sparsity.options import FROM_WEIGHTS


class FirstMasks(Protocol):
    """The first masks of some layers. :class:`~svite_scale.sparsity.allocation.mask_file.MaskFile` is one too."""

    def counts(self, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        """Returns the number of active weights of each layer, given the shapes of their weights.

        Raises:
            SparsifyError: the masks don't fit the layers.
        """
        ...

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Returns a layer's mask, bool ``[N]``, given its name and the shape of its weight, N elements."""
        ...


class NonzeroWeights:
    """Masks of weights that are pruned already: what is 0 is inactive."""

    def __init__(self, active: Callable[[str, torch.Size], Tensor]) -> None:
        """``active`` returns which weights of a layer aren't 0, bool ``[N]``, given its name and the shape of its weight."""
        self._active = active

    def counts(self, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        return {name: int(self.read(name, shape).sum()) for name, shape in shapes.items()}

    def read(self, name: str, shape: torch.Size) -> Tensor:
        active = self._active(name, shape)
        if active.is_meta:
            problem = f"the weight of {name} is on the meta device, where no zeros can be found"
            raise SparsifyError("masks", FROM_WEIGHTS, problem, "load the weights first")
        if not active.any():
            problem = f"all weights of {name} are 0, and no layer can be empty"
            raise SparsifyError("masks", FROM_WEIGHTS, problem, f"list {name} in keep_dense")
        return active


class SavedCounts:
    """Masks of as many active weights as a checkpoint has. The checkpoint replaces them, so any positions serve."""

    def __init__(self, num_active: Mapping[str, int]) -> None:
        """``num_active`` has the packed layers of the checkpoint; the others are dense."""
        self._num_active = num_active

    def counts(self, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        return {name: self._num_active.get(name, shape.numel()) for name, shape in shapes.items()}

    def read(self, name: str, shape: torch.Size) -> Tensor:
        return torch.arange(shape.numel()) < self._num_active[name]
