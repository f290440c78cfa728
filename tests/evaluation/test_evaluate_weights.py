"""``launch/evaluate.py --weights``: exports of every form, and state dicts, evaluate like the run that they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch

from svite_scale.evaluation.subject import defaults_of
from svite_scale.export.formats import FORMATS
from svite_scale.export.write import export_run
from svite_scale.saved_run import load_model, read_run
from svite_scale.sparsity.dense import to_dense
from tests.command_line import Answer
from tests.evaluation.test_evaluate_run import NUMBERS, evaluate_here, found_in, own_evaluation

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_dir(saved: Saved) -> Path:
    """A run without half of its heads, and of its neurons."""
    return saved("single")


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the run in a form, once."""
    folder = tmp_path_factory.mktemp("exported")
    return cache(lambda form: export_run(read_run(run_dir), form, folder / form))


@pytest.fixture
def evaluate_weights(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Evaluates weights on the run's data, by default into ``tmp_path / "evaluation"``."""
    monkeypatch.chdir(tmp_path)
    shards = f"data.val={run_dir.parent}/digits/val-*.tar"
    return lambda *arguments: evaluate_here(capsys, "--weights", *arguments, shards, "data.workers=0")


@pytest.mark.parametrize("form", sorted(FORMATS.keys() - {"onnx"}))
def test_export_evaluates_like_its_run(
    run_dir: Path, exported: Callable[[str], Path], tmp_path: Path, evaluate_weights: Callable[..., Answer], form: str
) -> None:
    """ONNX takes seconds to export; a program of pt2 is evaluated in the same way."""
    folder = exported(form)
    answer = evaluate_weights(folder, *(["--trust"] if form == "pt2" else []))
    assert answer.status == 0, answer.err
    found = found_in(tmp_path / "evaluation")
    assert {name: found[name] for name in NUMBERS} == pytest.approx(own_evaluation(run_dir), abs=1e-5)
    assert (found["weights"], found["form"], found["run"]) == (str(folder), form, run_dir.name)
    assert (found["checkpoint"], found["step"], found["ema"]) == ("step-00000020", 20, False)
    (file,) = [path for path in folder.iterdir() if path.name.startswith("model.") and path.suffix != ".json"]
    if form == "timm":
        assert evaluate_weights(file).status == 0, "a file stands for its folder"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dict_evaluates_like_the_run_of_its_weights(
    run_dir: Path, tmp_path: Path, evaluate_weights: Callable[..., Answer], suffix: str
) -> None:
    """Its sizes come from a config, or from the name of a model and overrides, and so does the normalisation."""
    state, path = to_dense(load_model(read_run(run_dir))).state_dict(), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    sizes = {"num_classes": 10, "image_size": 8, "in_channels": 1, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 8}
    by_name = [f"model.{name}={value}" for name, value in sizes.items()]
    for arguments in (
        ("--config", run_dir / "config.yaml"),
        ("--model", "vit_tiny_patch16_224", *by_name, "data.mean=[0.3]", "data.std=[0.35]", "data.eval_crop=1.0"),
    ):
        answer = evaluate_weights(path, *arguments)
        assert answer.status == 0, answer.err
        found = json.loads(answer.out)
        assert {name: found[name] for name in NUMBERS} == pytest.approx(own_evaluation(run_dir), abs=1e-6)
        assert found["model"] == "vit_tiny_patch16_224"


def test_defaults_are_those_that_timms_model_was_trained_with(caplog: pytest.LogCaptureFixture) -> None:
    assert defaults_of("vit_base_patch16_224") == {
        "model": {"name": "vit_base_patch16_224", "num_classes": 1000, "image_size": 224, "in_channels": 3},
        "data": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "eval_crop": 0.9},
    }
    assert not caplog.messages
    defaults_of("vit_base_patch16_224_miil")
    message = "vit_base_patch16_224_miil was trained with bilinear interpolation; here images are resized by bicubic"
    assert caplog.messages == [message]
    caplog.clear()
    defaults_of("vit_base_patch16_clip_384")
    assert caplog.messages == ["vit_base_patch16_clip_384 was trained with crop mode squash; here the centre is cropped"]
    assert defaults_of("no model") == {"model": {"name": "no model"}}


def test_weights_that_cannot_be_used_are_refused_in_one_line(
    run_dir: Path, exported: Callable[[str], Path], tmp_path: Path, evaluate_weights: Callable[..., Answer]
) -> None:
    path, folder = tmp_path / "weights.pth", exported("pt2")
    torch.save({"head.weight": torch.zeros(10, 32)}, path)
    config = ("--config", run_dir / "config.yaml")
    mistakes = {
        (path,): f"config error: --weights = '{path}': is no exported folder, nor a file in one: export.json is missing; ",
        (path, *config): f"config error: --weights = '{path}': isn't of this vit_tiny_patch16_224: it has no cls_token, ",
        (path, "--model", "vit_tinny_patch16_224"): "config error: model.name = 'vit_tinny_patch16_224': is no model that timm",
        (folder,): f"error on rank 0: {folder} is of the form pt2, and loading such a file can run code that is in it; ",
        (
            folder,
            "--trust",
            "train.precision=bf16",
        ): "config error: train.precision = 'bf16': can't be set for pt2; leave it o",
        (folder, "model.depth=3"): "config error: model.depth = '3': belongs to the trained weights, so an evaluation can't",
        (path, *config, "data.mean=[0.1,0.2]"): "config error: data.mean = [0.1, 0.2]: has 2 entries for 1 channels",
    }
    torch.save(to_dense(load_model(read_run(run_dir))).state_dict(), tmp_path / "whole.pth")
    for arguments, message in mistakes.items():
        weights = tmp_path / "whole.pth" if "data.mean=[0.1,0.2]" in arguments else arguments[0]
        answer = evaluate_weights(weights, *arguments[1:])
        assert (answer.status, answer.out) == (1 if "on rank 0" in message else 2, "")
        assert answer.err.startswith(message), answer.err
        assert len(answer.err.splitlines()) == 1
    assert not (tmp_path / "evaluation").exists()
