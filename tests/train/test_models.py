"""Runs of models that are no plain ViTs: engines agree, through updates of the topology, and bf16 takes buffers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.train.runs import ENGINES, losses_of, run
from tests.train.tiny import tiny_config

OWN_SIZES = ("model.patch_size=null", "model.embed_dim=null", "model.depth=null", "model.num_heads=null")
MODELS = {
    "rotary": ("model.name=vit_small_patch16_dinov3", "model.embed_dim=32", "parallel.backend=fsdp2"),
    "attention pooling, tokens": (
        *("model.name=vit_base_patch16_siglip_224", "sparsity.tokens.keep=3", "parallel.backend=fsdp2"),
        # Selectors draw other noise on each rank.
        "sparsity.tokens.blocks=[0]",
    ),
    "convolutions": ("model.name=convnext_atto", *OWN_SIZES, "model.image_size=32", "optimizer.lr=1e-3", *ENGINES["zero3"]),
}


@pytest.mark.parametrize("name", ["rotary", "convolutions"])
def test_two_ranks_learn_as_one(digits: Path, tmp_path: Path, name: str) -> None:
    """Five steps, with the topology's first update before the last."""
    steps = ("train.max_steps=5", "data.augment.recipe=none")
    run_on_ranks(2, run, tiny_config(digits, tmp_path / "two", *MODELS[name], *steps))
    run_on_ranks(1, run, tiny_config(digits, tmp_path / "one", *MODELS[name], *steps, *ENGINES["single"]))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=2e-3)
