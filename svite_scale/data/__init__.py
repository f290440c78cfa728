"""Tar shards with an exact global order.

What it offers
    - :class:`~svite_scale.data.loader.TrainData` and :class:`~svite_scale.data.loader.EvalData`: one rank's batches of uint8
      images; :class:`~svite_scale.data.transforms.DeviceTransform` turns them into the model's input on the device.
    - :func:`~svite_scale.data.make.shards.write_shards` writes such shards, in WebDataset's format, each with a JSON index
      beside it, which :func:`~svite_scale.data.format.patterns.load_indexes` reads; ``launch/make_shards.py`` does so from the
      command line in several processes, indexes shards of others, and verifies checksums.

What it guarantees
    - The order of an epoch is a pure function of the shards' counts, the seed and the epoch. A step's samples are the same for
      every world size, number of accumulation steps and number of workers; ranks take strided rows of them.
    - The stream can begin at any optimizer step: resuming needs that number and nothing else, also on another number of ranks.
    - A sample's augmentation on the CPU depends on (seed, epoch, sample, copy) only, and leaves global random state alone.
    - Evaluation counts every sample exactly once on any world size, with equally many batches on all ranks.
    - Shards behind URLs are fetched once per machine into a bounded folder that its processes share, completely or not at all.
    - What can't be read raises :class:`~svite_scale.errors.DataError`. In training, the next sample of its shard replaces an
      image that can't be decoded; evaluation leaves it out. Both are counted, and end the run above a fraction.

Where to read
    ``remote`` fetches shards; ``format`` says what a shard is; ``make`` writes shards, which training never imports. The files
    here read them, in this order: ``order`` (which sample comes when), ``dataset``, ``decode``, ``transforms`` and
    ``randomness`` (one sample), ``batches`` and ``workers`` (many of them, in loader processes), ``loader`` (the batches of a
    rank), with ``damage`` and ``fetch_ahead`` beside it.
"""
