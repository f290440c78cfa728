"""Exported folders of any form: what is in all of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svite_scale.errors import CheckpointError, ConfigError, ExportError
from svite_scale.export.formats import FORMATS, OnnxOptions
from svite_scale.export.read import FORMS, read_export
from svite_scale.export.write import export_run
from svite_scale.saved_run import read_run
from tests.command_line import ROOT, run_here

Saved = Callable[[str], Path]
SCRIPT = ROOT / "launch" / "export.py"


@pytest.fixture(scope="module")
def exported(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(read_run(saved("weights")), "timm", tmp_path_factory.mktemp("exported") / "out")


def test_export_json_describes_the_model_and_its_origin(saved: Saved, exported: Path) -> None:
    found = json.loads((exported / "export.json").read_text())
    assert found["form"] == "timm"
    assert found["model"]["name"] == "vit_tiny_patch16_224"
    assert (found["model"]["num_classes"], found["model"]["in_channels"], found["model"]["image_size"]) == (10, 1, 8)
    assert found["preprocessing"] == {
        "mean": [0.3],
        "std": [0.35],
        "image_size": 8,
        "eval_crop": 1.0,
        "interpolation": "bicubic",
    }
    assert found["origin"] == {"run": "weights", "checkpoint": "step-00000016", "step": 16, "ema": False}
    assert found["versions"].keys() == {"svite_scale", "torch", "timm"}
    assert str(saved("weights").parent) not in json.dumps(found), "no path of the machine"


@pytest.mark.parametrize("file", [".", "model.safetensors", "export.json"])
def test_read_export_takes_the_folder_or_a_file_in_it(exported: Path, file: str) -> None:
    found = read_export(exported / file)
    assert (found.form, found.name, found.num_classes) == ("timm", "vit_tiny_patch16_224", 10)
    assert found.preprocessing.mean == (0.3,)
    assert not found.model.training


def test_folder_that_is_not_empty_is_refused_and_stays(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=rf"^{tmp_path} exists and isn't an empty folder; give --out a new one"):
        export_run(read_run(saved("weights")), "timm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_when_an_export_fails(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no moving average"):
        export_run(read_run(saved("single")), "timm", tmp_path / "out", ema=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=rf"^can't write to {tmp_path}/file/out \(.*Not a directory"):
        export_run(read_run(saved("single")), "timm", tmp_path / "file" / "out")


def test_options_that_do_not_fit_are_refused_by_name(saved: Saved, tmp_path: Path) -> None:
    run = read_run(saved("single"))
    with pytest.raises(ConfigError, match=r"^--format = 'tflite': is no form of a model; use one of timm"):
        export_run(run, "tflite", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^--format = 'timm': takes no options of onnx"):
        export_run(run, "timm", tmp_path / "out", onnx=OnnxOptions(int8=8))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "holds no JSON object"),
        ("{", "Expecting property name"),
        ('{"form": "timm", "colour": 1}', "colour = 1: is no known key"),
        ('{"form": "timm"}', "preprocessing.mean = None: is missing"),
    ],
)
def test_damaged_export_json_is_refused_by_name(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(ExportError, match=rf"^{tmp_path}/export.json can't be used \(.*{problem}"):
        read_export(tmp_path)


def test_export_json_that_names_a_file_of_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    description = json.loads((exported / "export.json").read_text())
    description["model"]["weights"] = "/etc/passwd"
    (tmp_path / "export.json").write_text(json.dumps(description))
    with pytest.raises(ExportError, match=r"its model names a file of weights"):
        read_export(tmp_path)


def test_folder_without_export_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"^{tmp_path} holds no export: it has no export.json"):
        read_export(tmp_path)


def test_weights_of_another_model_are_refused(exported: Path, tmp_path: Path) -> None:
    description = json.loads((exported / "export.json").read_text())
    description["model"]["depth"] = 3
    (tmp_path / "export.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    with pytest.raises(ExportError, match=r"model.safetensors isn't of the model in .*: 12 tensors differ, first blocks.2"):
        read_export(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"model.safetensors can't be read"):
        read_export(tmp_path)


def test_forms_are_those_that_the_command_offers() -> None:
    assert list(FORMS) == list(FORMATS)


def test_command_prints_the_folder_or_one_line_on_stderr(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = saved("weights"), tmp_path / "out"
    given = ("--run", str(run_dir), "--out", str(out), "--format", "packed", "--ema", "--license", "mit")
    answer = run_here(capsys, *given, script=SCRIPT)
    assert (answer.status, answer.out) == (0, f"{out}\n")
    assert answer.err.startswith("export: 3 of 3 parts (100%)"), "progress"
    description = json.loads((out / "export.json").read_text())
    assert (description["form"], description["license"], description["origin"]["ema"]) == ("packed", "mit", True)
    card = (out / "README.md").read_text()
    assert "--run weights --checkpoint step-00000016 --format packed --ema --license mit --out FOLDER" in card
    again = run_here(capsys, *given, script=SCRIPT)
    assert (again.status, again.out) == (2, "")
    assert again.err == f"export error: {out} exists and isn't an empty folder; give --out a new one, or remove it\n"


def test_command_refuses_options_of_another_form(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--run", str(saved("weights")), "--out", str(tmp_path / "out"), "--format", "timm", "--int8", "8")
    answer = run_here(capsys, *given, script=SCRIPT)
    assert (answer.status, answer.err.splitlines()[-1]) == (
        2,
        "export error: --format = 'timm': takes no options of onnx; leave them out, or use --format onnx",
    )
