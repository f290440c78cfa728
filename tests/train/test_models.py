"""Runs of models that are no plain ViTs: engines agree through an update of the topology, and bf16 takes their buffers."""

from __future__ import annotations

from pathlib import Path

import pytest

from svite_scale.report.page import write_report
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, losses_of, metrics_of, run
from tests.tiny import tiny_config

OWN_SIZES = ("model.patch_size=null", "model.embed_dim=null", "model.depth=null", "model.num_heads=null")
MODELS = {
    "rotary": ("model.name=vit_small_patch16_dinov3", *ENGINES["fsdp2"]),
    "convolutions": ("model.name=test_convnext", *OWN_SIZES, "model.image_size=32", "optimizer.lr=1e-3", *ENGINES["zero3"]),
}
"""And the engine that trains it."""


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_like_one(digits: Path, tmp_path: Path, name: str) -> None:
    """Five steps, with an update of the topology before the last; then its report."""
    overrides = (*MODELS[name], "train.max_steps=5")
    run_on_ranks(2, run, tiny_config(digits, tmp_path / "two", *overrides))
    run_on_ranks(1, run, tiny_config(digits, tmp_path / "one", *overrides, *ENGINES["single"]))
    assert [line.get("grown", 0) > 0 for line in metrics_of(tmp_path / "two")] == [False, False, False, True, False]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=2e-3)
    assert "finished" in write_report([tmp_path / "two"], tmp_path / "report").read_text()


def test_bf16_trains_a_model_that_adds_buffers_to_parameters(digits: Path, tmp_path: Path) -> None:
    """EVA02's keys have no bias; a buffer of zeros stands between the parameters of queries and values."""
    bf16 = ("train.precision=bf16", "model.name=eva02_tiny_patch14_224", "sparsity.density=1.0", "train.max_steps=1")
    run_on_ranks(2, run, tiny_config(digits, tmp_path / "run", *bf16, *ENGINES["fsdp2"]))
    assert len(losses_of(tmp_path / "run")) == 1
