"""The files of a run directory, and what its metrics average."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from svite_scale.config.load import flatten_config, read_config
from svite_scale.config.schema import Config
from svite_scale.data.randomness import seed_step
from svite_scale.errors import RunError
from svite_scale.tracking.options import TrackingConfig
from tests.runs import metrics_of
from tests.tracking.trackers import tracker_of


def quiet(run_dir: Path) -> Config:
    return Config(run_dir=str(run_dir), tracking=TrackingConfig(mlflow=False))


def test_log_writes_lines_at_once_on_the_main_rank_only(tmp_path: Path) -> None:
    run_dir = tmp_path / "folder" / "run"
    with tracker_of(quiet(run_dir), run_dir, None, enabled=False) as tracker:
        tracker.log(1, {"loss": 2.0})
        tracker.summarize({"steps": 1})
        assert tracker.ui_command is None
    assert not run_dir.parent.exists()
    with tracker_of(quiet(run_dir), run_dir, None) as tracker:
        tracker.log(1, {"loss": 2.0})
        assert metrics_of(run_dir) == [{"step": 1, "loss": 2.0}]
        tracker.log(3, {"loss": 1.5, "density": 0.3})
        tracker.summarize({"steps": 3})
    assert metrics_of(run_dir)[1] == {"step": 3, "loss": 1.5, "density": 0.3}
    assert json.loads((run_dir / "summary.json").read_text()) == {"steps": 3}
    assert read_config(run_dir / "config.yaml") == quiet(run_dir)


@pytest.mark.parametrize("rest", ["", '{"step": 5, "lo', '{"step": 5'])
def test_a_resumed_run_removes_the_lines_after_its_checkpoint(tmp_path: Path, rest: str) -> None:
    whole = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 5))
    (tmp_path / "metrics.jsonl").write_text(whole + rest)
    with tracker_of(quiet(tmp_path), tmp_path, 3) as tracker:
        tracker.log(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in metrics_of(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_the_tracker_names_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=rf"^run_dir = '{tmp_path}/file/run' can't be written \(.*Not a directory"):
        tracker_of(quiet(tmp_path / "file" / "run"), tmp_path / "file" / "run", None)


def test_flatten_config_joins_names_by_dots_and_keeps_mappings_of_patterns() -> None:
    nested = {"a": 1, "b": {"c": [2, 3], "d": {"e": None}}, "sparsity": {"densities": {"blocks.*": 0.3}}}
    flat = {"a": 1, "b.c": [2, 3], "b.d.e": None, "sparsity.densities": {"blocks.*": 0.3}}
    assert flatten_config(nested) == flat


def test_what_a_step_draws_depends_on_where_it_is_alone() -> None:
    def draw(*entropy: int) -> tuple[float, float, float]:
        import random

        import numpy as np

        seed_step(*entropy)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 10, 0, 1), (0, 1, 0, 10)]
    drawn = [draw(*place) for place in places]
    assert drawn == [draw(*place) for place in places]
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == len(places)
    assert not any(math.isclose(a, b) for a, b, _ in drawn)
