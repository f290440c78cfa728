"""Runs whose config says where the weights are by patterns, or by a file of masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svite_scale.config.load import read_config
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity import bits
from svite_scale.sparsity.packing import prunable_layers
from tests.command_line import run_here
from tests.runs import metrics_of
from tests.sparsity.packing import packed_layers
from tests.tiny import tiny_config, write_config_file


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_run_by_patterns_resumes_with_the_same_patterns_only(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    path = write_config_file(digits, run_dir, tmp_path / "tiny.yaml")
    keys = ("sparsity.density=1.0", "sparsity.keep_dense=[head]")
    start = ["--config", str(path), *keys, 'sparsity.densities={"*.mlp.*": 0.25, "*": 0.5}']
    assert run_here(capsys, *start, "train.max_steps=5").status == 0
    # 2 blocks of 8192 weights in their MLPs and 4096 others, and 512 in the patches; the head isn't counted.
    density = (0.25 * 2 * 8192 + 0.5 * (2 * 4096 + 512)) / (2 * 8192 + 2 * 4096 + 512)
    assert {line["density"] for line in metrics_of(run_dir)} == {density}
    assert json.loads((run_dir / "summary.json").read_text())["density"] == density
    assert read_config(run_dir / "config.yaml") == read_config(path, [*start[2:], "train.max_steps=5"])

    again = ["--config", str(path), "--resume", *keys, "train.max_steps=6"]
    answer = run_here(capsys, *again, 'sparsity.densities={"*": 0.5}')
    assert answer.status == 1
    assert "was saved with sparsity.densities = {'*.mlp.*': 0.25, '*': 0.5}, not {'*': 0.5}; restore it" in answer.err
    assert run_here(capsys, *again, start[-1]).status == 0
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_run_starts_from_a_file_of_masks(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(digits, tmp_path / "run", "sparsity.density=1.0")
    dense, _ = build_sparse(config.model, config.sparsity, seed=0)
    masks = {name: torch.rand(layer.weight.shape) < 0.2 for name, layer in prunable_layers(dense).items()}
    save_file({f"{name}.weight": mask for name, mask in masks.items()}, tmp_path / "masks")
    keys = ("sparsity.density=1.0", f"sparsity.masks={tmp_path / 'masks'}", "train.max_steps=2")
    assert run_here(capsys, "--config", str(tmp_path / "run.yaml"), *keys).status == 0
    density = float(torch.cat([mask.flatten() for mask in masks.values()]).double().mean())
    assert metrics_of(tmp_path / "run")[-1]["density"] == pytest.approx(density, rel=1e-12)

    config = tiny_config(digits, tmp_path / "run", *keys)
    model, _ = build_sparse(config.model, config.sparsity, config.seed)
    for name, layer in packed_layers(model).items():
        assert torch.equal(bits.unpack(layer.mask, layer.shape.numel()), masks[name].flatten())
