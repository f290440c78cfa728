"""What docs/library.md and the README show of a loop of one's own runs, and they name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import svite_scale
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "library.md").read_text()
ALL_BLOCKS = [block.split("```")[0] for block in PAGE.split("```python\n")[1:]]
BLOCKS = [block for block in ALL_BLOCKS if "load_weights" not in block]
STARTS = [block for block in ALL_BLOCKS if "load_weights" in block]
"""Two ways to start a loop, each with a model of its own; the other blocks are one loop."""


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_classes=5)


def pages_code(folder: str) -> tuple[int, list[float]]:
    """Runs the page from top to bottom: steps of the loaded topology, and the dense model's answer minus the sparse one's."""
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    names: dict[str, Any] = {"model": model(), "loader": [(images, labels)] * 3, "images": images, "folder": folder}
    names |= {"evaluate": lambda model: model(images), "distance": torch.nn.functional.mse_loss}
    for block in BLOCKS:
        exec(block, names)
    assert names["loss"].item() >= 0
    names["model"].eval()
    return names["topology"].steps, (names["dense"].eval()(images) - names["model"](images)).flatten().tolist()


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    ((steps, difference),) = run_on_ranks(1, pages_code, str(tmp_path))
    assert steps == 3
    assert difference == pytest.approx([0.0] * 20, abs=1e-5)


def test_the_page_starts_from_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exported/pruned").mkdir(parents=True)
    source = model()
    save_file(source.state_dict(), "deit_small.safetensors")
    with torch.no_grad():
        source.head.weight[:, ::2] = 0
    save_file(source.state_dict(), "exported/pruned/model.safetensors")
    dense, pruned = ({"model": model(), "svite_scale": svite_scale} for _ in STARTS)
    for block, names in zip(STARTS, (dense, pruned), strict=True):
        exec(block, names)
    layer = dense["model"].blocks[0].attn.qkv
    assert layer.num_active < layer.shape.numel()
    assert torch.equal(layer.dense_weight().count_nonzero(), torch.tensor(layer.num_active))
    assert pruned["model"].head.num_active == 5 * 24


def test_the_page_names_every_public_name_and_no_other() -> None:
    rows = [line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| `")]
    calls = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    errors = set(re.findall(r"`(\w+Error)`", PAGE))
    assert calls | errors | {"__version__"} == set(svite_scale.__all__)


def test_the_loop_of_the_readme_runs() -> None:
    (block,) = (part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n")[1:])
    names: dict[str, Any] = {"model": model(), "torch": torch}
    exec(block, names)
    assert names["topology"].steps == 1
