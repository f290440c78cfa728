"""Checkpoints that belong to no engine and survive a kill at any instant.

A checkpoint is a directory ``step-00001240`` of ``checkpoints/``: tensors in logical coordinates, written through
``torch.distributed.checkpoint``; ``run.json``, everything else; and ``manifest.json``, the size and SHA-256 of each file,
written last. It gets its name when it is complete.

:class:`~svite_scale.checkpoint.checkpoint.Checkpoint` saves and loads one run's. Below it: :mod:`.state` (tensors in logical
coordinates), :mod:`.save` (a save on all ranks), :mod:`.load`, :mod:`.directory` (names, what is kept, the newest valid one),
:mod:`.manifest`, :mod:`.compatibility` (what a resumed run must share with the saved one), :mod:`.collective_io` (one rank's
error becomes all ranks').
"""
