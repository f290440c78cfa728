"""What docs/library.md shows of a loop of one's own runs, and the page names what there is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import timm
import torch

import svite_scale
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "library.md").read_text()
BLOCKS = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]


def run_page(folder: str) -> tuple[int, float]:
    """Runs the code of the page; returns the steps of the topology that it saved and loaded, and the teacher's distance."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_classes=5)
    names: dict[str, Any] = {"torch": torch, "model": model, "images": images, "distance": torch.nn.functional.mse_loss}
    names["evaluate"] = lambda model: model(images)
    three_lines, optimizer, *others = BLOCKS
    before, after = three_lines.split("topology = ")
    os.chdir(folder)
    for code in (before, optimizer, f"topology = {after}", *others):
        exec(code, names)
    return names["topology"].steps, names["loss"].item()


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    ((steps, distance),) = run_on_ranks(1, run_page, str(tmp_path))
    assert steps == 1
    assert distance == 0.0, "the average begins with the weights"


def test_the_page_names_every_public_name() -> None:
    named = set(re.findall(r"\w+", PAGE))
    assert set(svite_scale.__all__) - named == {"__version__"}


def test_the_readme_shows_the_same_three_lines() -> None:
    assert BLOCKS[0] in (ROOT / "README.md").read_text()
