"""Random state of the training step, as a pure function of where in the run it is."""

from __future__ import annotations

import random

import numpy as np
import torch

from svite_scale.data.randomness import derive_seeds


def seed_step(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's global generators, on all devices.

    Called before each micro-batch with (seed, step, micro-batch, rank), so that a resumed run draws what the uninterrupted one
    would have, with no generator state to save.
    """
    python_seed, numpy_seed, torch_seed = derive_seeds(*entropy)
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.manual_seed(torch_seed)
