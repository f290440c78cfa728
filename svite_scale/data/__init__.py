"""Tar shards with an exact global order.

What it offers
    - :class:`TrainData` and :class:`EvalData`: one rank's batches, from (:class:`Batch`) uint8 images in tar shards;
      :class:`DeviceTransform` turns them into the model's input on the device.
    - :func:`write_shards` writes such shards, in WebDataset's format, each with a JSON index beside it, which
      :func:`load_indexes` reads; ``launch/make_shards.py`` does so from the command line in several processes, indexes
      shards of others, and verifies checksums.

What it guarantees
    - The order of an epoch is a pure function of the shards' counts, the seed and the epoch. A step's samples are the same for
      every world size, number of accumulation steps and number of workers; ranks take strided rows of them.
    - The stream can begin at any optimizer step: resuming needs that number and nothing else, also on another number of ranks.
    - A sample's augmentation on the CPU depends on (seed, epoch, sample, copy) only, and leaves global random state alone.
    - Evaluation counts every sample exactly once on any world size, with equally many batches on all ranks.
    - Shards behind URLs are fetched once per machine into a bounded folder that its processes share, whole or not at all.
    - What can't be read raises :class:`~svite_scale.errors.DataError`. For an image that can't be decoded the next of its shard
      stands in at training, and evaluation leaves it out; both are counted, and fatal above a share.

How it is laid out
    ``format`` says what a shard is, ``make`` writes shards, ``remote`` fetches them. Here they are read: ``order`` and
    ``steps`` hold the pure functions; ``reader``, ``decode``, ``dataset``, ``transforms`` and ``randomness`` make one sample;
    ``batches``, ``damage``, ``fetch_ahead``, ``loader`` and ``device`` make batches.
"""

from __future__ import annotations

from svite_scale.data.device import DeviceTransform
from svite_scale.data.format.index import ShardIndex, load_indexes
from svite_scale.data.loader import Batch, EvalData, TrainData, explained
from svite_scale.data.make.shards import Sample, write_shards

__all__ = [
    "Batch",
    "DeviceTransform",
    "EvalData",
    "Sample",
    "ShardIndex",
    "TrainData",
    "explained",
    "load_indexes",
    "write_shards",
]
