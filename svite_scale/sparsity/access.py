"""What the topology update needs of an engine: to read and write one parameter and its optimizer state in full."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class ParameterAccess(Protocol):
    """Reads and writes one parameter of a wrapped model at a time, whatever shards it.

    Every method is a collective: all ranks call it with the same parameter, and get or give the same full tensor.
    Implementations for each engine are in :mod:`svite_scale.parallel`.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full value on every rank: fp32 master values of a trainable parameter, the bytes of a mask."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replaces the full value, in the master copy and in what the next forward computes with."""

    def read_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's elementwise state by its name (``exp_avg``, ...), each fp32 and shaped like the parameter.

        Empty before the first optimizer step.
        """

    def write_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        """Replaces what :meth:`read_moments` returned."""
