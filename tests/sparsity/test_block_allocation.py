"""How many blocks of weights are active, and which: by a density, by patterns, a file, or the weights themselves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import svite_scale
from svite_scale.errors import OptionError, SparsifyError
from svite_scale.models.options import ModelConfig, SparseModelOptions, StructuredConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.blocks import BlockConv2d, BlockLinear
from svite_scale.sparsity.layers.packed import PackedConv2d, PackedLinear
from tests import reference
from tests.config.config_text import MINIMAL, error_of, written
from tests.sparsity.packing import packed_layers

BLOCK = (16, 4)
SIZES = {"0": (48, 32), "1": (32, 48), "2": (64, 32), "3": (10, 64)}
"""Rows and columns of the layers. The block doesn't divide the last."""
BLOCKS = {"0": 3 * 8, "1": 2 * 12, "2": 4 * 8}
"""Blocks of those that it divides."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in SIZES.values()))


def norms(weight: Tensor) -> list[float]:
    """The norm of each block, by the definition of a block."""
    flat = weight.detach().flatten().tolist()
    units = reference.unit_positions(weight.shape, BLOCK)
    return [math.hypot(*(flat[position] for position in unit)) for unit in units]


def active_blocks(layer: nn.Module) -> list[int]:
    """The numbers of the blocks that aren't 0."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return [number for number, norm in enumerate(norms(weight)) if norm > 0]


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_counts_are_exact_in_whole_blocks(distribution: str) -> None:
    model, before = net(), net()
    found_plan = svite_scale.sparsify(model, 0.3, distribution=distribution, block=BLOCK, init="dense")
    plan = {entry.name: entry for entry in found_plan}
    densities = dict.fromkeys(plan, 0.3)
    if distribution == "erk":
        densities = reference.erk_densities({name: entry.shape for name, entry in plan.items()}, 0.3)
    # Blocks and single weights have a budget each, the rounded sum of their layers' parts.
    budget = round(sum(densities[name] * number for name, number in BLOCKS.items()))
    found = {name: len(active_blocks(model.get_submodule(name))) for name in BLOCKS}
    assert sum(found.values()) == budget
    assert all(abs(number - densities[name] * BLOCKS[name]) < 1 for name, number in found.items())
    assert plan["3"].num_active == round(densities["3"] * 640)
    for name, number in found.items():
        layer: Any = model.get_submodule(name)
        assert (plan[name].block, plan[name].num_active) == (BLOCK, number * 64)
        assert (layer.num_active, tuple(layer.values.shape)) == (number, (number, 4, 16))
        assert layer.mask.numel() == BLOCKS[name] // 8, "a bit for each block"
        weight = before.get_submodule(name).weight
        assert torch.equal(layer.weight, weight * (layer.weight != 0)), "active weights keep their values"


def test_patterns_say_the_density_of_layers_in_blocks() -> None:
    model = net()
    svite_scale.sparsify(model, densities={"0": 0.5, "2": 0.25, "*": 1.0}, block=BLOCK)
    assert {name: layer.num_active for name, layer in packed_layers(model).items()} == {"0": 12, "2": 8}
    assert type(model[1]) is type(model[3]) is nn.Linear


def test_the_blocks_of_largest_norm_are_active_by_magnitude() -> None:
    model = net()
    expected = {}
    for name, number in (("0", 12), ("1", 12), ("2", 16)):
        of_blocks = norms(model.get_submodule(name).weight)
        expected[name] = sorted(sorted(range(len(of_blocks)), key=lambda block: -of_blocks[block])[:number])
    svite_scale.sparsify(model, 0.5, distribution="uniform", block=BLOCK, by_magnitude=True)
    assert {name: active_blocks(model.get_submodule(name)) for name in expected} == expected


def without_blocks(numbers: dict[str, list[int]]) -> nn.Sequential:
    """The model with zeros in these blocks."""
    model = net()
    for name, blocks in numbers.items():
        weight = model.get_submodule(name).weight
        units = reference.unit_positions(weight.shape, BLOCK)
        weight.data.view(-1)[[position for block in blocks for position in units[block]]] = 0
    return model


def test_blocks_of_zeros_are_inactive_from_weights() -> None:
    model = without_blocks({"0": [0, 5, 23], "1": [7]})
    with torch.no_grad():
        model[0].weight[20:40] = 0.0  # of blocks 8 to 23 a part, or the middle row as a whole
    svite_scale.sparsify(model, masks="from_weights", block=BLOCK)
    assert active_blocks(model[0]) == [1, 2, 3, 4, 6, 7, *range(8, 23)]
    assert active_blocks(model[1]) == [*range(7), *range(8, 24)]
    assert list(packed_layers(model)) == ["0", "1"]
    model = net()
    with torch.no_grad():
        model[0].weight[::2] = 0.0
    with pytest.raises(SparsifyError, match=r"no block of \[16, 4\] is 0, so this model isn't pruned; give a density"):
        svite_scale.sparsify(model, masks="from_weights", block=BLOCK, keep_dense=["3"])


def masks() -> dict[str, Tensor]:
    model = without_blocks({"0": [0, 5], "1": [7], "2": [1, 2, 3]})
    model[3].weight.data[:, ::2] = 0
    return {f"{name}.weight": model.get_submodule(name).weight != 0 for name in SIZES}


def test_a_mask_file_has_whole_blocks(tmp_path: Path) -> None:
    given, path, model = masks(), tmp_path / "masks", net()
    save_file(given, path)
    svite_scale.sparsify(model, masks=path, block=BLOCK)
    assert {name: type(layer) for name, layer in packed_layers(model).items()} == {
        "0": BlockLinear,
        "1": BlockLinear,
        "2": BlockLinear,
        "3": PackedLinear,
    }
    for name, mask in given.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight != 0, mask)
    given["1.weight"][3, 3] = False
    save_file(given, path)
    model = net()
    with pytest.raises(SparsifyError, match=r"its tensor 1\.weight has blocks of \[16, 4\] that are active in part; set whole"):
        svite_scale.sparsify(model, masks=path, block=BLOCK)
    assert not packed_layers(model)


def test_layers_that_blocks_dont_divide_keep_single_weights_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 2, stride=2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 2, stride=1),
        nn.Conv2d(16, 32, 2, stride=2, groups=2),
        nn.Conv2d(32, 10, 2, stride=2),
        nn.Linear(16, 32),
    )
    plan = svite_scale.sparsify(model, 0.5, distribution="uniform", block=BLOCK)
    assert [type(layer) for layer in model] == [BlockConv2d, *[PackedConv2d] * 4, BlockLinear]
    assert [entry.block for entry in plan] == [BLOCK, *[(1, 1)] * 4, BLOCK]
    assert caplog.messages == [
        "layers that blocks of 16 x 4 don't divide keep single weights, which take the time of dense ones (4): 1, 2, 3, 4"
    ]
    with pytest.raises(SparsifyError, match=r"block = \[7, 7\]: divides no layer's weight; 0, for one, has 48 rows and 32 col"):
        svite_scale.sparsify(net(), 0.5, block=(7, 7))


WRONG = {"[0, 1]": "is below 1", "[16]": "is not a list of 2", "16": "is not a list of 2", "'16x16'": "is not a list of 2"}


@pytest.mark.parametrize("value", WRONG)
def test_what_is_no_block_is_refused_in_one_line(tmp_path: Path, value: str) -> None:
    """In a config, on the command line, and in Python."""
    remedy = r".*; use a list of 2, each entry a whole number of at least 1$"
    said = re.escape(WRONG[value]) + remedy
    in_file = error_of(written(tmp_path, f"{MINIMAL}sparsity: {{block: {value}}}"))
    on_command_line = error_of(written(tmp_path, MINIMAL), (f"sparsity.block={value}",))
    for error in (in_file, on_command_line):
        assert re.match(rf"sparsity\.block = .*: {said}", str(error))
    with pytest.raises(OptionError, match=rf"^block = .*: {said}"):
        svite_scale.sparsify(net(), 0.5, block=eval(value))


def test_heads_and_neurons_go_with_blocks() -> None:
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=8,
        patch_size=4,
        embed_dim=32,
        depth=1,
        num_heads=4,
        in_channels=1,
        num_classes=10,
    )
    sparsity = SparseModelOptions(density=0.5, distribution="uniform", block=(16, 1), structured=StructuredConfig(heads=0.5))
    model = build_sparse(config, sparsity, seed=0).model
    assert {name: layer.unit for name, layer in sparse_layers(model).items()} == {
        "patch_embed.proj": "blocks",
        "blocks.0.attn.heads": "heads",
        "blocks.0.mlp.fc1": "blocks",
        "blocks.0.mlp.fc2": "blocks",
        "head": "weights",
    }
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
