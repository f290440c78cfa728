"""What shards are written from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from svite_scale.data.make.shards import Sample


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
    def origin(self, number: int) -> str:
        """What that sample is made of, known without making it: a text that changes when the sample does.

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
