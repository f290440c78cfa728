"""The sliced form: a smaller model of the same answers, that one file rebuilds without this package."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svite_scale import to_dense
from svite_scale.errors import ExportError
from svite_scale.export.read import read_export
from svite_scale.export.sliced_form import describe, slice_model
from svite_scale.export.write import export_run
from svite_scale.models import sliced_model
from svite_scale.models.sliced_model import dense_state_dict, load, save
from svite_scale.saved_run import evaluation_images, load_model, read_run
from tests.command_line import run_command
from tests.export.sparse_models import MODELS, images_for, logits_of, sparse_model

Saved = Callable[[str], Path]


def write(name: str, folder: Path) -> Path:
    model, config = sparse_model(name)
    save(slice_model(model, config), describe(model, config), folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_gives_the_logits_of_the_sparse_model(name: str, tmp_path: Path) -> None:
    model, config = sparse_model(name)
    images = images_for(config)
    expected = logits_of(model, images)
    assert expected.std(dim=0).min() > 1e-3, "or the images had no part in it"
    torch.testing.assert_close(logits_of(load(write(name, tmp_path)), images), expected, atol=1e-5, rtol=0)


def test_only_active_units_are_in_the_file(tmp_path: Path) -> None:
    tensors = load_file(write("units and tokens", tmp_path) / sliced_model.WEIGHTS)
    shapes = {
        name.removeprefix("blocks.1."): list(each.shape) for name, each in tensors.items() if name.startswith("blocks.1.")
    }
    # 2 of 4 heads of width 6, and int(0.6 * 96) = 57 neurons.
    assert shapes["attn.qkv.weight"] == [36, 24]
    assert shapes["attn.qkv.bias"] == [36]
    assert shapes["attn.proj.weight"] == [24, 12]
    assert shapes["mlp.fc1.weight"] == [57, 24]
    assert shapes["mlp.fc1.bias"] == [57]
    assert shapes["mlp.fc2.weight"] == [24, 57]
    description = json.loads((tmp_path / sliced_model.DESCRIPTION).read_text())
    assert description["heads"]["blocks.1.attn"] == {"active": 2, "of": 4}
    assert description["neurons"]["blocks.1.mlp"] == {"active": 57, "of": 96}
    # 18 tokens: int(0.6 * 18 + 0.5) pass the first selector, int(0.6 * 11 + 0.5) the second.
    assert [selector["num_tokens"] for selector in description["selectors"].values()] == [11, 7]


@pytest.mark.parametrize("name", [name for name in MODELS if "paper" not in name])
def test_dense_state_dict_is_that_of_the_dense_model(name: str, tmp_path: Path) -> None:
    model, _ = sparse_model(name)
    state, expected = dense_state_dict(write(name, tmp_path)), to_dense(model).state_dict()
    # The classifiers of token selectors are for training only.
    expected = {name: tensor for name, tensor in expected.items() if ".classifier." not in name}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_dense_state_dict_gives_the_same_logits_where_the_model_keeps_columns_of_absent_heads(tmp_path: Path) -> None:
    (name,) = [name for name in MODELS if "paper" in name]
    model, config = sparse_model(name)
    dense = to_dense(model)
    dense.load_state_dict(dense_state_dict(write(name, tmp_path)))
    images = images_for(config)
    torch.testing.assert_close(logits_of(dense, images), logits_of(model, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "svite_scale.sliced.v2", "no format"),
        ("architecture", "hf-hub:somebody/model", "has no model 'hf-hub:somebody/model'"),
        ("options", {"checkpoint_path": "evil.pth"}, r"\['checkpoint_path'\] aren't among"),
        ("more", 1, "has the fields"),
    ],
)
def test_description_of_another_kind_is_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    path = write("units", tmp_path) / sliced_model.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = write("units", tmp_path) / sliced_model.WEIGHTS
    tensors = load_file(path)
    save_file(tensors | {"blocks.0.mlp.fc1.weight": tensors["blocks.0.mlp.fc1.weight"][:-1].contiguous()}, path)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        load(tmp_path)


@pytest.fixture(scope="module")
def exported(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with absent heads, neurons and tokens."""
    return export_run(read_run(saved("tokens")), "sliced", tmp_path_factory.mktemp("sliced") / "out")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_exported_folder_has_the_file_and_gives_the_logits_of_the_run(saved: Saved, exported: Path) -> None:
    files = ["README.md", "export.json", "model.json", "model.safetensors", "sliced_model.py"]
    assert sorted(path.name for path in exported.iterdir()) == files
    assert (exported / "sliced_model.py").read_text() == Path(sliced_model.__file__).read_text()
    run = read_run(saved("tokens"))
    images = evaluation_images(run.config, 8).inputs
    expected = logits_of(load_model(run), images)
    torch.testing.assert_close(logits_of(read_export(exported).model, images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        (
            "architecture",
            "deit_tiny_patch16_224",
            "it is of 'deit_tiny_patch16_224', and export.json of 'vit_tiny_patch16_224'",
        ),
        ("heads", {"blocks.7.attn": {"active": 1, "of": 2}}, "no attribute `7`"),
        ("neurons", {"blocks.0.mlp": 3}, "subscriptable"),
    ],
)
def test_folder_with_another_description_is_refused(
    field: str, value: object, problem: str, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / sliced_model.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ExportError, match=rf"^{tmp_path} can't be used \(.*{problem}"):
        read_export(tmp_path)


STANDALONE = """
import sys
for name in ("svite_scale", "deepspeed", "accelerate", "mlflow", "onnx", "onnxruntime"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import torch
from sliced_model import load
with torch.inference_mode():
    torch.save(load(sys.argv[1])(torch.load(sys.argv[1] + "/images.pt")), sys.argv[1] + "/logits.pt")
"""


def test_copied_file_loads_the_model_without_this_package(tmp_path: Path) -> None:
    name = "units and tokens"
    model, config = sparse_model(name)
    images = images_for(config)
    shutil.copy(sliced_model.__file__, write(name, tmp_path))
    torch.save(images, tmp_path / "images.pt")
    answer = run_command(sys.executable, "-c", STANDALONE, str(tmp_path))
    assert answer.status == 0, answer.err
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(model, images), atol=1e-5, rtol=0)
