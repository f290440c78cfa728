"""Runs that several folders of tests read: trained once in a session, when the first test asks for one."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_on_ranks
from tests.runs import ENGINES, run
from tests.tiny import tiny_config, write_digits
from tests.train.test_units import UNITS

RUNS = {
    "single": (1, (*ENGINES["single"], *UNITS, "checkpoint.every_epochs=2")),
    "fsdp2": (2, (*ENGINES["fsdp2"], *UNITS)),
    "weights": (1, (*ENGINES["single"], "train.ema_decay=0.9", "train.eval_ema=true")),
    "blocks": (1, (*ENGINES["single"], "sparsity.block=[16, 4]", "sparsity.density=0.5", "sparsity.distribution=uniform")),
    "tokens": (
        2,
        (
            *ENGINES["fsdp2"],
            *UNITS,
            "sparsity.tokens.keep=0.6",
            "sparsity.tokens.blocks=[0, 1]",
            "sparsity.density=0.5",
            "sparsity.block=[16, 4]",
        ),
    ),
}
"""By name, ranks and overrides. ``weights`` is sparse by single weights, ``blocks`` by blocks, but for the head, whose 10 rows
are in none. ``tokens`` is sparse by everything: patches by blocks, the head by single weights, heads, neurons, and tokens. Of 4
patches and a class token, 2 patches pass its first selector, and 1 the second."""


class SavedRuns:
    """The directories of the runs, in a folder beside their shards, ``digits/``."""

    def __init__(self, folder: Path) -> None:
        (folder / "digits").mkdir()
        self._folder, self._shards = folder, write_digits(folder / "digits")

    def __call__(self, name: str) -> Path:
        world_size, overrides = RUNS[name]
        if not (self._folder / name).exists():
            run_on_ranks(world_size, run, tiny_config(self._shards, self._folder / name, *overrides))
        return self._folder / name
