"""The form packed, read by a decoder in numpy that knows only the layout's text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from svite_scale.cost.flops import count_flops
from svite_scale.errors import ExportError
from svite_scale.export import packed_form
from svite_scale.export.form import Export, describe
from svite_scale.export.read import read_export
from svite_scale.export.write import export_run
from svite_scale.models.options import ModelConfig, SparseModelOptions
from svite_scale.models.sparse import build_sparse
from svite_scale.saved_run import evaluation_images, load_model, read_run
from svite_scale.sparsity.dense import to_dense
from tests.report.by_hand import tensors as tensors_of_checkpoint

Saved = Callable[[str], Path]
Array = np.ndarray[Any, Any]
LAYER = "blocks.1.mlp.fc2"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def dense_weights(path: Path) -> dict[str, Array]:
    """Decodes a file by the text: bit by bit, row by row."""
    tensors, dense = load_file(path), {}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        if end == "compressed":
            rows, columns = (int(size) for size in tensors[f"{module}.shape"])
            weight, offsets = np.zeros((rows, columns), tensor.dtype), tensors[f"{module}.row_offsets"]
            assert tensors[f"{module}.bitmask"].shape == (rows, math.ceil(columns / 8))
            for row in range(rows):
                read = int(offsets[row])
                for column in range(columns):
                    if tensors[f"{module}.bitmask"][row, column // 8] >> (column % 8) & 1:
                        weight[row, column] = tensor[read]
                        read += 1
                assert read == (int(offsets[row + 1]) if row + 1 < rows else tensor.size)
            dense[f"{module}.weight"] = weight
        elif f"{module}.compressed" not in tensors or end == "bias":
            dense[name] = tensor
    return dense


@pytest.mark.parametrize("name", ["weights", "blocks", "single", "tokens"])
def test_independent_decoder_gives_the_same_bits(saved: Saved, tmp_path: Path, name: str) -> None:
    run = read_run(saved(name))
    folder = export_run(run, "packed", tmp_path / "out")
    found, model = dense_weights(folder / "model.safetensors"), load_model(run)
    expected = to_dense(model).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].tobytes() == tensor.numpy().tobytes(), key
    images = evaluation_images(run.config, 8).inputs
    with torch.inference_mode():
        torch.testing.assert_close(read_export(folder).model(images), model(images), rtol=0, atol=1e-5)


def test_bitmask_is_the_mask_of_the_checkpoint(saved: Saved, tmp_path: Path) -> None:
    run = read_run(saved("weights"))
    export_run(run, "packed", tmp_path / "out")
    found, checkpoint = load_file(tmp_path / "out" / "model.safetensors"), tensors_of_checkpoint(run.checkpoint)
    names = [name.removesuffix(".mask") for name in checkpoint if name.endswith(".mask")]
    assert len(names) >= 8, "four layers in each of two blocks"
    for name in names:
        np.testing.assert_array_equal(found[f"{name}.bitmask"].ravel(), checkpoint[f"{name}.mask"])
        np.testing.assert_array_equal(found[f"{name}.compressed"], checkpoint[f"{name}.values"])


@pytest.mark.parametrize(("name", "num_layers"), [("weights", 8), ("blocks", 10), ("single", 8)])
def test_active_weights_that_are_zero_stay_active(saved: Saved, name: str, num_layers: int) -> None:
    model = load_model(read_run(saved(name)))
    before = packed_form.active_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    after = packed_form.active_weights(model)
    assert before.keys() == after.keys()
    assert len(before) == num_layers
    for key, active in before.items():
        assert 0 < active.sum() < active.numel()
        assert torch.equal(after[key], active), key


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_file_is_as_small_as_the_density(saved: Saved, tmp_path: Path, density: float) -> None:
    sizes = ModelConfig(name="deit_small_patch16_224", depth=3)
    model = build_sparse(sizes, SparseModelOptions(density=density), seed=1).model.eval()
    cost = count_flops(model, 224)
    packed_form.write(Export(run := read_run(saved("weights")), model, describe(run, "packed")), tmp_path)
    dense_bytes = 4 * cost.params_dense
    assert (tmp_path / "model.safetensors").stat().st_size / dense_bytes <= cost.params_active / cost.params_dense + 0.04


@pytest.mark.parametrize(
    ("end", "change", "problem"),
    [
        ("shape", lambda array: array[:1], "shape isn't int64"),
        ("shape", lambda array: array * 2, "bitmask isn't uint8"),
        ("bitmask", lambda array: array ^ 1, "compressed is .*, but bitmask has"),
        ("compressed", lambda array: array[1:], "compressed is .*, but bitmask has"),
        ("row_offsets", lambda array: array + 1, "row_offsets aren't"),
    ],
)
def test_damaged_matrix_is_refused_by_name(
    saved: Saved, tmp_path: Path, end: str, change: Callable[[Array], Array], problem: str
) -> None:
    folder = export_run(read_run(saved("weights")), "packed", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.{end}"] = change(tensors[f"{LAYER}.{end}"])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ExportError, match=rf"model.safetensors is damaged \({LAYER}.weight: {problem}"):
        read_export(folder)
    del tensors[f"{LAYER}.{end}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"model.safetensors (is damaged|isn't of the model)"):
        read_export(folder)
    assert json.loads((folder / "export.json").read_text())["form"] == "packed"
