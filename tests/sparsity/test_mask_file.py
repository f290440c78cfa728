"""Masks from a safetensors file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svite_scale.errors import SparsifyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.allocation import mask_file
from svite_scale.sparsity.allocation.mask_file import MaskFile
from svite_scale.sparsity.packing import sparsify
from tests.sparsity.packing import packed_layers

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 5), nn.Linear(5, 4))


def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(module.weight.shape, generator=generator) < 0.4 for name, module in weighted(net())}
    return {f"{name}.weight": mask for name, mask in masks.items()}


def weighted(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "weight")]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_gets_the_masks_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    masks = drawn()
    save_file({name: mask.to(dtype) for name, mask in masks.items()}, tmp_path / "masks")
    model = net()
    plan = sparsify(model, masks=tmp_path / "masks", init="dense")
    assert [(entry.name, entry.num_active) for entry in plan] == [
        (name, int(masks[f"{name}.weight"].sum())) for name in ("0", "2", "3")
    ]
    assert not any(entry.raised for entry in plan)
    for name, dense in weighted(net()):
        layer, mask = packed_layers(model)[name], masks[f"{name}.weight"]
        assert torch.equal(bits.unpack(layer.mask, mask.numel()), mask.flatten())
        assert torch.equal(layer.dense_weight(), dense.weight * mask)


def test_a_mask_of_ones_leaves_the_layer_dense(tmp_path: Path) -> None:
    save_file(drawn() | {"2.weight": torch.ones(5, 3)}, tmp_path / "masks")
    model = net()
    assert [entry.is_packed for entry in sparsify(model, masks=str(tmp_path / "masks"))] == [True, False, True]
    assert type(model[2]) is nn.Linear


def test_layers_kept_dense_need_no_mask(tmp_path: Path) -> None:
    save_file({name: mask for name, mask in drawn().items() if name != "3.weight"}, tmp_path / "masks")
    plan = sparsify(net(), masks=tmp_path / "masks", keep_dense=["3"])
    assert [entry.kept_dense for entry in plan] == [False, False, True]


def test_a_plan_on_the_meta_device_reads_counts(tmp_path: Path) -> None:
    save_file(drawn(), tmp_path / "masks")
    with torch.device("meta"):
        model = net()
        plan = sparsify(model, masks=tmp_path / "masks")
    assert plan == sparsify(net(), masks=tmp_path / "masks")
    assert all(parameter.is_meta for parameter in model.parameters())


def with_tensor(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    """The good file with one tensor replaced, added or removed."""
    masks = drawn() | ({} if tensor is None else {name: tensor})
    return {key: value for key, value in masks.items() if tensor is not None or key != name}


WRONG = {
    "missing": (with_tensor("2.weight", None), "has no tensor 2.weight; add it, or list 2 in keep_dense"),
    "unknown": (with_tensor("2.bias", torch.ones(5)), "its tensor 2.bias is of no prunable layer; remove it"),
    "shape": (with_tensor("2.weight", torch.ones(3, 5)), "its tensor 2.weight is of shape (3, 5); use the weight's, (5, 3)"),
    "flat": (with_tensor("2.weight", torch.ones(15)), "its tensor 2.weight is of shape (15,); use the weight's, (5, 3)"),
    "weights": (
        with_tensor("2.weight", torch.full((5, 3), 0.5)),
        "its tensor 2.weight holds something else than 0 and 1;",
    ),
    "minus": (with_tensor("2.weight", -torch.ones(5, 3)), "its tensor 2.weight holds something else than 0 and 1"),
    "nan": (with_tensor("2.weight", torch.full((5, 3), torch.nan)), "its tensor 2.weight holds something else than 0 and 1"),
    "empty": (with_tensor("2.weight", torch.zeros(5, 3)), "its tensor 2.weight has no active weight; set at least one"),
    "complex": (with_tensor("2.weight", torch.ones(5, 3) + 0j), "its tensor 2.weight is of dtype C64; save it as torch.bool"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_file_that_doesnt_fit_is_refused_and_changes_nothing(tmp_path: Path, mistake: str) -> None:
    tensors, message = WRONG[mistake]
    path = tmp_path / "masks"
    save_file(tensors, path)
    model = net()
    with pytest.raises(SparsifyError, match=re.escape(f"masks = {str(path)!r}: {message}")):
        sparsify(model, masks=path)
    assert not packed_layers(model)


def test_a_mask_for_a_layer_kept_dense_is_refused(tmp_path: Path) -> None:
    save_file(drawn(), tmp_path / "masks")
    with pytest.raises(SparsifyError, match=r"its tensor 3\.weight is of no prunable layer; .* of no layer in keep_dense"):
        sparsify(net(), masks=tmp_path / "masks", keep_dense=["3"])


def test_a_file_that_cant_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=r"masks = '.*/none': is no file; check the path"):
        MaskFile(tmp_path / "none")
    (tmp_path / "text").write_text("0 1 1 0")
    for path in (tmp_path / "text", tmp_path):
        with pytest.raises(SparsifyError, match=r"can't be read as safetensors \(.*\); write it with safetensors"):
            MaskFile(path)


def test_one_tensor_at_a_time_is_read(tmp_path: Path) -> None:
    """The file is opened for one tensor, and closed before the next."""
    save_file(drawn(), tmp_path / "masks")
    read: list[list[str]] = []

    class Watched:
        def __init__(self, *arguments: str) -> None:
            self.file = safe_open(*arguments)

        def __enter__(self) -> Watched:
            read.append([])
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            read[-1].append(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

    with patch.object(mask_file, "safe_open", Watched):
        sparsify(net(), masks=tmp_path / "masks")
    assert max(map(len, read)) == 1
    assert {name for names in read for name in names} == set(drawn())
