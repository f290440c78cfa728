"""The way back in: a run that starts from an export of another run has its logits and its masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import svite_scale
from svite_scale.errors import ConfigError, OptionError
from svite_scale.export.write import export_run
from svite_scale.models.sparse import SparseModel, build_sparse, plan_sparse
from svite_scale.saved_run import SavedRun, evaluation_images, load_model, read_run
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers

Saved = Callable[[str], Path]

UNITS, WEIGHTS, BLOCKS, TOKENS = "single", "weights", "blocks", "tokens"
FORMS = [(WEIGHTS, "timm"), (WEIGHTS, "sliced"), (WEIGHTS, "packed"), (UNITS, "timm"), (UNITS, "sliced"), (UNITS, "packed")]
FORMS += [(BLOCKS, "timm"), (BLOCKS, "packed"), (TOKENS, "sliced"), (TOKENS, "packed")]


def start_from(run: SavedRun, folder: Path, build: Callable[..., SparseModel] = build_sparse) -> SparseModel:
    """Returns what a run with the config of another one builds from an export of that one, by another seed."""
    config, sparsity = run.config, run.config.sparsity
    if sparsity.density < 1.0:
        sparsity = replace(sparsity, density=1.0, distribution="erk", masks="from_weights")
    model = replace(config.model, weights=str(folder))
    return build(model, sparsity, 99) if build is build_sparse else build(model, sparsity)


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bits.unpack(layer.mask, layer.shape.numel()) for name, layer in sparse_layers(model).items()}


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_run_that_starts_from_an_export_has_the_same_logits_and_masks(
    saved: Saved, tmp_path: Path, name: str, form: str
) -> None:
    run = read_run(saved(name))
    model, images = load_model(run), evaluation_images(run.config, 20).inputs
    folder = export_run(run, form, tmp_path / "out")
    begun, plan = start_from(run, folder)
    torch.testing.assert_close(begun.eval()(images), model(images), atol=1e-6, rtol=0)
    masks, expected = masks_of(begun), masks_of(model)
    assert masks.keys() == expected.keys()
    assert len(masks) > 3
    assert all(torch.equal(masks[layer], expected[layer]) for layer in masks)
    assert start_from(run, folder, plan_sparse).layers == plan


def test_packed_keeps_active_weights_that_are_zero(saved: Saved, tmp_path: Path) -> None:
    """As grown weights are just after an update. Other forms can't tell them from inactive ones."""
    run = read_run(saved(WEIGHTS))
    folder = export_run(run, "packed", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    grown = "blocks.0.attn.qkv.compressed"
    tensors[grown][:5] = 0
    save_file(tensors, folder / "model.safetensors")
    begun, _ = start_from(run, folder)
    layer = sparse_layers(begun)["blocks.0.attn.qkv"]
    assert torch.equal(layer.values, tensors[grown])
    assert torch.equal(masks_of(begun)["blocks.0.attn.qkv"], masks_of(load_model(run))["blocks.0.attn.qkv"])


def test_forms_without_readable_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match=r"is a folder without model\.safetensors; give .* writes as timm, sliced or packed"):
        svite_scale.load_weights(model, tmp_path)
    with pytest.raises(OptionError, match=r"can't be read as a state dict \(it is no file of torch\.save, or holds more "):
        svite_scale.load_weights(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("damage", ["bits", "shape", "missing"])
def test_damaged_packed_weights_are_refused_by_name(saved: Saved, tmp_path: Path, damage: str) -> None:
    run = read_run(saved(WEIGHTS))
    folder = export_run(run, "packed", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    if damage == "bits":
        tensors["blocks.0.attn.qkv.bitmask"][0, 0] ^= 1
    elif damage == "shape":
        tensors["blocks.0.attn.qkv.shape"] = torch.tensor([], dtype=torch.int64)
    else:
        del tensors["blocks.0.attn.qkv.row_offsets"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^model\.weights = '.*/out': .*blocks\.0\.attn\.qkv\.weight") as caught:
        start_from(run, folder)
    assert "\n" not in str(caught.value)
