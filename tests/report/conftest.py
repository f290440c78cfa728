from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.runs import ENGINES, run
from tests.tiny import tiny_config, write_digits
from tests.train.test_units import UNITS

RUNS = {
    "single": (1, (*ENGINES["single"], *UNITS, "checkpoint.every_epochs=2")),
    "fsdp2": (2, (*ENGINES["fsdp2"], *UNITS)),
    "weights": (1, ENGINES["single"]),
    "tokens": (2, (*ENGINES["fsdp2"], *UNITS, "sparsity.tokens.keep=0.6", "sparsity.tokens.blocks=[0, 1]")),
}
"""By name, ranks and overrides. ``weights`` is sparse by single weights. Of 4 patches and a class token, 2 patches pass the
first selector of ``tokens``, and 1 the second."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a run of :data:`RUNS`, trained once; its shards are ``digits/`` beside it."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "digits").mkdir()
    write_digits(folder / "digits")

    def run_dir(name: str) -> Path:
        world_size, overrides = RUNS[name]
        if not (folder / name).exists():
            run_on_ranks(world_size, run, tiny_config(folder / "digits", folder / name, *overrides))
        return folder / name

    return run_dir
