"""Exported folders of any form: what is in all of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from shutil import copytree

import pytest

from svite_scale.errors import CheckpointError, ConfigError, ExportError
from svite_scale.export.formats import FORMATS, OnnxOptions
from svite_scale.export.read import FORMS, read_export
from svite_scale.export.write import _new_folder, export_run
from svite_scale.saved_run import read_run
from tests.command_line import ROOT, run_here
from tests.small_disk import mounted

Saved = Callable[[str], Path]
SCRIPT = ROOT / "launch" / "export.py"


@pytest.fixture(scope="module")
def exported(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(read_run(saved("weights")), "timm", tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture(scope="module")
def exported_in(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports a run in a form, once."""
    folder = tmp_path_factory.mktemp("forms")
    return cache(lambda form: export_run(read_run(saved("single")), form, folder / form))


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
    with pytest.raises(ExportError, match=rf"^can't write to {tmp_path}/file/out \(.*File exists"):
        export_run(read_run(saved("single")), "timm", tmp_path / "file" / "out")


@pytest.mark.parametrize("kind", ["the current folder", "a link", "a mount point"])
def test_export_fills_an_empty_folder_that_exists(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A mount point, like a link, can't be replaced by a rename."""
    folder, out = tmp_path / "folder", tmp_path / "folder"
    with mounted(folder) if kind == "a mount point" else nullcontext(folder.mkdir()):
        if kind == "the current folder":
            monkeypatch.chdir(folder)
            out = Path()
        elif kind == "a link":
            out = tmp_path / "link"
            out.symlink_to("folder")
        assert export_run(read_run(saved("weights")), "timm", out) == out
        assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "export.json", "model.safetensors"}
        assert read_export(out).num_classes == 10
    assert out.is_symlink() == (kind == "a link")


def test_export_ignores_what_a_killed_one_left(saved: Saved, tmp_path: Path) -> None:
    """Of the same process id, as in a container."""
    out = tmp_path / "out"
    killed = _new_folder(out)
    killed.__enter__()
    (left,) = tmp_path.iterdir()
    export_run(read_run(saved("weights")), "timm", out)
    assert read_export(out).num_classes == 10
    assert set(tmp_path.iterdir()) == {left, out}


def test_exported_folder_can_be_read_as_the_umask_says(saved: Saved, exported: Path) -> None:
    (exported.parent / "other").mkdir()
    assert exported.stat().st_mode == (exported.parent / "other").stat().st_mode
    (exported.parent / "other" / "file").touch()
    assert {file.stat().st_mode for file in exported.iterdir()} == {(exported.parent / "other" / "file").stat().st_mode}


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


@pytest.mark.parametrize("form", ["sliced", "pt2"])
@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"num_classes": 12}, r"it says images \[2, 1, 8, 8\] and 12 classes, but its logits have the shape \[2, 10\]; export"),
        ({"image_size": 12}, r"it says images \[2, 1, 12, 12\] and 10 classes, but .+; export the model again$"),
        ({"image_size": 10**9}, r"it says images .* and 10 classes, but .+; export the model again$"),
    ],
)
def test_description_of_another_model_is_refused(
    exported_in: Callable[[str], Path], tmp_path: Path, form: str, sizes: dict[str, int], problem: str
) -> None:
    folder = copytree(exported_in(form), tmp_path / "copy")
    description = json.loads((folder / "export.json").read_text())
    description["model"].update(sizes)
    if "image_size" in sizes:
        (folder / "export.json").write_text(json.dumps(description))
        with pytest.raises(ExportError, match=r"its preprocessing gives images of 8 pixels, and its model takes 1"):
            read_export(folder, trusted=True)
        description["preprocessing"].update(sizes)
    (folder / "export.json").write_text(json.dumps(description))
    with pytest.raises(ExportError, match=rf"^{folder}/export.json isn't of the model beside it: {problem}") as caught:
        read_export(folder, trusted=True)
    assert "\n" not in str(caught.value)


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
