"""The count of damaged samples belongs to the run, and survives a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from svite_scale.config.schema import Config
from svite_scale.data.make.shards import Sample, write_shards
from tests.data.numbered import speckled
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, metrics_of, resumed_run, run
from tests.tiny import tiny_config

COUNT, NUM_BROKEN = 48, 5
"""Three steps show every sample once."""


@pytest.fixture
def shards(tmp_path: Path, digits: Path) -> str:
    samples = [Sample(f"{n:02d}", speckled(n) if n >= NUM_BROKEN else b"junk", "png", n % 10) for n in range(COUNT)]
    write_shards(samples, tmp_path / "shards", "train", 12)
    return f"{tmp_path}/shards/train-*.tar"


def test_resumed_run_keeps_its_count_of_damaged_samples(tmp_path: Path, digits: Path, shards: str) -> None:
    def config(last_step: int, engine: str) -> Config:
        damage = (f"data.train={shards}", "data.max_damaged=1.0", f"train.max_steps={last_step}")
        return tiny_config(digits, tmp_path / "run", *ENGINES[engine], *damage)

    run_on_ranks(2, run, config(4, "fsdp2"))
    run_on_ranks(1, resumed_run, config(9, "single"))
    counts = {line["step"]: line["damaged_samples"] for line in metrics_of(tmp_path / "run")}
    assert {step: counts[step] for step in (3, 6, 9)} == {3: NUM_BROKEN, 6: 2 * NUM_BROKEN, 9: 3 * NUM_BROKEN}
    assert counts[5] >= counts[4] >= NUM_BROKEN
