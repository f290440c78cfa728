"""Random generators seeded for one sample, or for one step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Restores the states of Python's, numpy's and torch's CPU generators after the block.

    So a loader without workers doesn't disturb the training process. The states have kilobytes, so use it once for a batch
    rather than for each sample.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_sample(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's CPU generators.

    Transforms draw from these global generators. They are seeded for each sample, so a sample's augmentation doesn't depend on
    the worker that computes it.
    """
    # Not torch.manual_seed: that would also seed the GPU's generators, which aren't restored.
    _seed(entropy, torch.default_generator.manual_seed)


def seed_step(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's generators, on all devices.

    Called before each micro-batch with (seed, step, micro-batch, rank). So a resumed run draws the same numbers as an
    uninterrupted one, and no generator state has to be saved.
    """
    _seed(entropy, torch.manual_seed)


def _seed(entropy: Sequence[int], seed_torch: Callable[[int], object]) -> None:
    """Seeds Python's, numpy's and torch's generators; different entropy gives unrelated seeds."""
    python_seed, numpy_seed, torch_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    seed_torch(torch_seed)
