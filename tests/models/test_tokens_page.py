"""What docs/tokens.md shows works as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from svite_scale.config.load import to_dict
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig, TokensConfig
from svite_scale.models.token_selector import token_selectors
from tests.cost.costs import count

PAGE = (Path(__file__).parents[2] / "docs" / "tokens.md").read_text()


def test_the_page_names_every_key_and_every_default() -> None:
    rows = [line.split(" | ")[:2] for line in PAGE.splitlines() if line.startswith("| `")]
    shown = {}
    for keys, defaults in rows:
        names = [key.strip("|` ") for key in keys.split(",")]
        shown |= dict(zip(names, defaults.split(", ") if len(names) > 1 else [defaults], strict=True))
    written = {
        key: "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in to_dict(TokensConfig()).items()
    }
    assert shown == written


def test_the_saving_of_the_page_is_what_is_counted() -> None:
    sparsity = SparsityConfig(density=0.5, tokens=TokensConfig(keep=0.95))
    cost = count(Config(run_dir="unused", model=ModelConfig(name="deit_small_patch16_224"), sparsity=sparsity))
    assert f"save {100 * cost.saving:.2f}%" in PAGE


def test_the_loop_of_the_page_runs_and_anneals() -> None:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
    model = build_dense(ModelConfig(name="vit_tiny_patch16_224", **sizes))  # type: ignore[arg-type]
    names: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "F": F}
    names |= {"images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 999])}
    exec(PAGE.split("```python")[1].split("```")[0], names)
    names["loss"].backward()
    (selector,) = token_selectors(model)
    assert all(parameter.grad is not None for parameter in selector.parameters())
    names["topology"].steps = 50_000
    names["topology"]._prepare_step()
    assert selector.passing == selector.num_patches == round(0.9 * 65) - 1, "keep has fallen"
