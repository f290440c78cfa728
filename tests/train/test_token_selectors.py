"""Runs with token selectors: what they log, and the model that they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup

from svite_scale.config.load import to_dict
from svite_scale.export.form import DESCRIPTION, describe, read_description, write_description
from svite_scale.models.dense import build_dense
from svite_scale.models.options import TokensConfig
from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.models.token_selector import token_selectors
from svite_scale.saved_run import load_model, read_run
from svite_scale.train.loss import TrainingLoss
from tests.ranks import run_on_ranks
from tests.runs import metrics_of, run
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def plain_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that drops half of the patches in training only."""
    run_dir = tmp_path_factory.mktemp("tokens") / "run"
    options = "sparsity.tokens.training_keep=0.5", "sparsity.tokens.training_keep_until=0.75", "train.log_every=1"
    run_on_ranks(1, run, tiny_config(digits, run_dir, *options))
    return run_dir


def test_a_run_logs_the_tokens_of_each_step_and_the_loss_of_its_selectors(plain_run: Path) -> None:
    """Of 4 patches and a class token; 12 of 16 steps are 75%."""
    lines = metrics_of(plain_run)
    assert [line["tokens"] for line in lines] == [3] * 12 + [5] * 4
    assert all(line["selector_loss"] > 0 for line in lines)
    assert "temperature" not in lines[0]


def test_tokens_that_are_dropped_in_training_only_leave_a_plain_model(plain_run: Path) -> None:
    saved = read_run(plain_run)
    model = load_model(saved)
    assert not token_selectors(model)
    assert not [name for name in model.state_dict() if "selector" in name]
    assert model.blocks.get_submodule("0") is next(model.blocks.children())  # type: ignore[union-attr, operator]
    description = describe(saved, "timm")
    assert description.tokens == TokensConfig()


def test_an_export_of_an_earlier_version_has_the_selectors_of_the_paper(plain_run: Path, tmp_path: Path) -> None:
    description = to_dict(describe(read_run(plain_run), "packed")) | {"tokens": to_dict(TokensConfig(keep=0.5))}
    for name in ("signal", "keep_warmup", "training_keep", "training_keep_until"):
        del description["tokens"][name]
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    found = read_description(tmp_path)
    assert found.tokens == TokensConfig(keep=0.5, signal="paper")
    write_description(found, tmp_path)
    assert read_description(tmp_path) == found


def test_selectors_learn_from_mixed_and_smoothed_labels(digits: Path, tmp_path: Path) -> None:
    config = tiny_config(digits, tmp_path / "run")
    model = build_dense(config.model).train()
    (selector,) = insert_token_selectors(model, keep=0.6)
    images, targets = Mixup(mixup_alpha=1.0, num_classes=10, label_smoothing=0.0)(torch.randn(4, 1, 8, 8), torch.arange(4))
    assert targets.shape == (4, 10)
    model(images)
    logits = selector.logits.detach()  # type: ignore[union-attr, operator]
    found = TrainingLoss(config, 0.1, torch.device("cpu")).of_selectors(model, targets)
    smoothed = 0.9 * targets + 0.1 / 10
    assert float(found.detach()) == pytest.approx(float(-(smoothed * F.log_softmax(logits, dim=1)).sum(dim=1).mean()), rel=1e-5)
