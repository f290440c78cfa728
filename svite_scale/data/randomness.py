"""Random generators seeded for one sample, or for one step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def restored() -> Iterator[None]:
    """Puts the states of Python's, numpy's and torch's CPU generators back after the block.

    It keeps a loader without workers from disturbing the training process. The states are kilobytes large, so batches are
    wrapped in it rather than samples.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds the generators within the block, and puts their states back after it."""
    with restored():
        seed_sample(*entropy)
        yield


def seed_sample(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's CPU generators.

    Transforms draw from these global generators. Seeding them per sample makes a sample's augmentation independent of the
    worker that computes it.
    """
    python_seed, numpy_seed, torch_seed = derived_seeds(*entropy)
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    # Not torch.manual_seed: that would also seed the GPU's generators, which are not restored.
    torch.default_generator.manual_seed(torch_seed)


def seed_step(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's generators, on all devices.

    Called before each micro-batch with (seed, step, micro-batch, rank). So a resumed run draws the same numbers as an
    uninterrupted one, and no generator state has to be saved.
    """
    python_seed, numpy_seed, torch_seed = derived_seeds(*entropy)
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.manual_seed(torch_seed)


def derived_seeds(*entropy: int) -> tuple[int, int, int]:
    """Seeds for Python's, numpy's and torch's generators, unrelated for unlike entropy."""
    python_seed, numpy_seed, torch_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    return python_seed, numpy_seed, torch_seed
