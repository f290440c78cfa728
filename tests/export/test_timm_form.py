"""The form timm: what timm itself reads from the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from svite_scale.data.options import DataConfig
from svite_scale.data.transforms import DeviceTransform, eval_transform, to_pil
from svite_scale.errors import ExportError
from svite_scale.export import timm_form
from svite_scale.export.form import Export, describe
from svite_scale.export.read import read_export
from svite_scale.export.write import export_run
from svite_scale.models.sparse import build_sparse
from svite_scale.saved_run import evaluation_images, load_model, read_run

Saved = Callable[[str], Path]


@pytest.mark.parametrize(("name", "ema"), [("weights", False), ("weights", True), ("blocks", False), ("single", False)])
def test_timm_gives_the_same_logits(saved: Saved, tmp_path: Path, name: str, ema: bool) -> None:
    run = read_run(saved(name))
    folder = export_run(run, "timm", tmp_path / "out", ema=ema)
    model = load_model(run, ema=ema)
    images = evaluation_images(run.config, 37).inputs
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(by_timm(images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(read_export(folder).model(images), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1, "a trained model tells images apart"
    sizes = timm.data.resolve_model_data_config(by_timm)
    assert {key: sizes[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")} == {
        "input_size": (1, 8, 8),
        "mean": [0.3],
        "std": [0.35],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }


def test_timm_form_has_zeros_where_inactive(saved: Saved, tmp_path: Path) -> None:
    run = read_run(saved("weights"))
    export_run(run, "timm", tmp_path / "out")
    active = {name: mask for name, mask in load_model(run).named_parameters() if name.endswith(".mask")}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name, mask in active.items():
            zeros = int((file.get_tensor(name.replace(".mask", ".weight")) == 0).sum())
            bits = sum(byte.bit_count() for byte in mask.tolist())
            assert zeros == file.get_tensor(name.replace(".mask", ".weight")).numel() - bits


def test_model_with_token_selectors_has_no_timm_form(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^--format timm: the model has token selectors.*use sliced, packed, onnx or pt2$"):
        export_run(read_run(saved("tokens")), "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_config_json_claims_nothing_of_other_weights(saved: Saved, tmp_path: Path) -> None:
    export_run(read_run(saved("single")), "timm", tmp_path / "out", license="mit")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "mit"
    assert config["pretrained_cfg"]["tag"] is None
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 10


@pytest.mark.parametrize("shape", [(3, 50, 41), (3, 32, 32), (3, 20, 90)])
def test_transform_that_timm_makes_from_the_folder_is_the_one_of_evaluation(
    saved: Saved, tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    run = read_run(saved("weights"))
    model, data = replace(run.config.model, image_size=32, in_channels=3), DataConfig(eval_crop=0.875)
    sparse = build_sparse(model, run.config.sparsity, seed=0).model.eval()
    own_run = replace(run, config=replace(run.config, model=model, data=data))
    timm_form.write(Export(own_run, sparse, describe(own_run, "timm")), tmp_path)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(by_timm))
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = eval_transform(data, 32)(pixels)
    inputs, _ = DeviceTransform(data, 10, torch.device("cpu"), training=False)(ours[None], torch.zeros(1))
    torch.testing.assert_close(transform(to_pil(pixels)), inputs[0], rtol=0, atol=1e-5)
