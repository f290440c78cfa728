"""The form pt2: what torch alone computes from the file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svite_scale.errors import ExportError
from svite_scale.export.read import read_export
from svite_scale.export.write import export_run
from svite_scale.saved_run import evaluation_images, load_model, read_run
from tests.command_line import run_command

Saved = Callable[[str], Path]

TORCH_ALONE = """
import sys
import torch

model = torch.export.load(sys.argv[1] + "/model.pt2").module()
images = torch.load(sys.argv[1] + "/images.pt")
with torch.inference_mode():
    torch.save([model(images[:count]) for count in (1, 2, 37)], sys.argv[1] + "/logits.pt")
assert not {"svite_scale", "timm", "deepspeed"} & sys.modules.keys()
"""


def test_torch_alone_gives_the_same_logits_for_any_batch(saved: Saved, tmp_path: Path) -> None:
    run = read_run(saved("tokens"))
    folder = export_run(run, "pt2", tmp_path / "out")
    images = evaluation_images(run.config, 37).inputs
    torch.save(images, folder / "images.pt")
    answer = run_command(sys.executable, "-c", TORCH_ALONE, str(folder))
    assert answer.status == 0, answer.err
    with torch.inference_mode():
        expected = load_model(run)(images)
    for found in torch.load(folder / "logits.pt"):
        torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["weights", "single"])
def test_read_export_takes_a_program_that_is_trusted(saved: Saved, tmp_path: Path, name: str) -> None:
    run = read_run(saved(name))
    folder = export_run(run, "pt2", tmp_path / "out")
    with pytest.raises(ExportError, match=r"can run code that is in it; if you trust whoever made it, .*trusted=True"):
        read_export(folder)
    model, images = read_export(folder, trusted=True).model, evaluation_images(run.config, 5).inputs
    assert not model.eval().training
    with torch.inference_mode():
        torch.testing.assert_close(model(images), load_model(run)(images), rtol=0, atol=1e-5)


def test_damaged_program_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = export_run(read_run(saved("weights")), "pt2", tmp_path / "out")
    (folder / "model.pt2").write_bytes((folder / "model.pt2").read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"model\.pt2 can't be read \("):
        read_export(folder, trusted=True)
