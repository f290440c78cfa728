"""What shards are written from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from svite_scale.data.shards import Sample


class Origin(NamedTuple):
    """What a sample is made of, known without making it."""

    text: str
    """Changes when the sample does."""
    changed_ns: int
    """When it last changed, in nanoseconds since 1970; 0 for what never does."""


class Source(ABC):
    """Samples by number, in a fixed order, so that several processes can each make a part of them."""

    keys: Sequence[str]
    """Of the samples, in their order."""
    classes: Sequence[str] | None = None
    """Names of the labels from 0, where the source has them."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Files found that make no sample, counted by kind."""

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """The sample of ``keys[number]``.

        Raises:
            DataError: it can't be made.
        """

    @abstractmethod
    def origin(self, number: int) -> Origin:
        """What that sample is made of.

        Raises:
            DataError: it is missing.
        """

    def prepare(self) -> None:  # noqa: B027
        """Loads what all samples need, before processes are forked to make them."""

    @property
    def samples(self) -> Iterator[Sample]:
        """All samples, in order."""
        return (self.sample(number) for number in range(len(self.keys)))


def permutation(count: int, seed: int = 0) -> list[int]:
    """A fixed permutation; numpy keeps the streams of RandomState for ever."""
    return np.random.RandomState(seed).permutation(count).tolist()
