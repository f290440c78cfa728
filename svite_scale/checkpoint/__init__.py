"""Checkpoints that belong to no engine and survive a kill at any instant.

A checkpoint is a directory ``checkpoints/step-00001240`` of a run. It holds tensors in logical coordinates, written through
``torch.distributed.checkpoint``; ``run.json`` with everything else; and ``manifest.json``, written last, with the size and
SHA-256 of each file. The directory gets its name when it is complete.

:class:`~svite_scale.checkpoint.checkpoint.Checkpoint` saves and loads one run. It stands on

- :mod:`.state`: the tensors of a run in logical coordinates
- :mod:`.save`: one save on all ranks
- :mod:`.load`: reading a checkpoint without running anything in it (:mod:`.plain_pickle`)
- :mod:`.compatibility`: what a resumed run must share with the saved run
- :mod:`.directory`: names, removal, ownership, the newest valid checkpoint
- :mod:`.manifest`: sizes and checksums of files
- :mod:`.collective_io`: file operations that succeed or fail on all ranks together
"""
