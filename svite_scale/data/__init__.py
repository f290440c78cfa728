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
    ``command``, ``output``, ``shards``, ``processes`` and ``files`` write; ``source``, ``builtin``, ``folder`` and ``labels``
    are what they write from; ``patterns``, ``info``, ``scan`` ``index`` and ``index_time`` find it again; ``rule`` and
    ``left_out`` tell samples from other files, in folders and tars alike; ``urls``, ``fetch``, ``cache``, ``cache_folder`` and
    ``fetch_ahead`` bring remote shards here; ``order`` and ``steps`` hold the pure functions; ``reader``, ``decode``,
    ``dataset``, ``transforms`` and ``randomness`` make one sample; ``batches``, ``damage``, ``loader`` and ``device`` make
    batches.
"""

from __future__ import annotations

from svite_scale.data.device import DeviceTransform
from svite_scale.data.index import ShardIndex, load_indexes
from svite_scale.data.loader import Batch, EvalData, TrainData, explained
from svite_scale.data.shards import Sample, write_shards

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
