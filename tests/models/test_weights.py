"""Weights that a model starts from: files read and fitted, masks from their zeros, and the largest ones active first."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import svite_scale
from svite_scale.errors import ConfigError, OptionError, SparsifyError, TopologyError
from svite_scale.models.options import ModelConfig, SparseModelOptions, StructuredConfig
from svite_scale.models.sparse import SparseModel, build_sparse, plan_sparse
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers
from tests.sparsity.packing import packed_layers

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 7}
CONFIG = {
    **{"name": "vit_tiny_patch16_224", "image_size": 16, "in_channels": 3, "patch_size": 4, "embed_dim": 24, "depth": 2},
    **{"num_heads": 4, "num_classes": 7},
}


def vit(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SIZES, **options}).eval()


def saved(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


def pruned(model: nn.Module, density: float = 0.4) -> nn.Module:
    """Sets about ``1 - density`` of the weights of each block's linear layers to 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("blocks"):
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < density)
    return model


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def nested_in(key: str, prefix: str = "") -> Callable[[nn.Module, Path], Any]:
    def save(model: nn.Module, path: Path) -> None:
        state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, path)

    return save


FILES = {
    "safetensors": ("w.safetensors", saved),
    "alone": ("w.pth", lambda model, path: torch.save(model.state_dict(), path)),
    "old format": (
        "w.pth",
        lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    ),
    "in model": ("w.pth", nested_in("model")),
    "of timm's trainer": ("w.pth.tar", nested_in("state_dict", "module.")),
    "in a folder": ("model.safetensors", saved),
    "of a wrapped model": ("w.safetensors", lambda model, path: saved(nn.ModuleDict({"module": model}), path)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_model_gets_the_weights_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    name, save = FILES[kind]
    source, model, images = vit(0), vit(1), torch.randn(2, 3, 16, 16)
    save(source, tmp_path / name)
    svite_scale.load_weights(model, tmp_path if kind == "in a folder" else tmp_path / name)
    assert torch.equal(model(images), source(images))
    assert not lines_of(caplog)


@pytest.mark.parametrize(("taken", "left"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_choice_of_one_of_several_state_dicts_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, taken: str, left: str
) -> None:
    source, model, path = vit(0), vit(1), tmp_path / "w.pth"
    torch.save({left: vit(2).state_dict(), taken: source.state_dict(), "optimizer": {"state": {}}, "epoch": 3}, path)
    svite_scale.load_weights(model, path)
    assert torch.equal(model.norm.weight + model.cls_token, source.norm.weight + source.cls_token)
    assert lines_of(caplog) == [f"{path}: the weights under '{taken}' are taken, not those under '{left}'"]


@pytest.mark.parametrize("size", [8, 32])
def test_positions_of_another_image_size_are_interpolated_as_timm_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    path, images = saved(vit(0), tmp_path / "w.safetensors"), torch.randn(2, 3, size, size)
    model = vit(1, img_size=size)
    svite_scale.load_weights(model, path)
    overlay = {"file": str(path), "num_classes": 7}
    timms_own = vit(2, img_size=size, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model(images), timms_own(images))
    assert lines_of(caplog) == [f"{path}: position embeddings are interpolated from 4 x 4 patches to {size // 4} x {size // 4}"]


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (1, 3)])
def test_other_channels_answer_alike_for_grey_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, theirs: int, ours: int
) -> None:
    source, model, grey = vit(0, in_chans=theirs), vit(1, in_chans=ours), torch.randn(2, 1, 16, 16)
    path = saved(source, tmp_path / "w.safetensors")
    svite_scale.load_weights(model, path)
    expected = source(grey.expand(-1, theirs, -1, -1))
    torch.testing.assert_close(model(grey.expand(-1, ours, -1, -1)), expected)
    assert lines_of(caplog) == [f"{path}: patch_embed.proj.weight is adapted from {theirs} channels to {ours}"]


@pytest.mark.parametrize(("theirs", "reason"), [(11, "the file's has 11"), (0, "there is none in the file")])
def test_a_head_of_other_classes_stays_as_it_was_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, theirs: int, reason: str
) -> None:
    source, model, drawn = vit(0, num_classes=theirs), vit(1), vit(1)
    path = saved(source, tmp_path / "w.safetensors")
    svite_scale.load_weights(model, path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.forward_features(images), source.forward_features(images))
    assert torch.equal(model.head.weight, drawn.head.weight)
    assert lines_of(caplog) == [f"{path}: the head is new, for 7 classes; {reason}"]


def test_both_heads_of_a_distilled_model_are_new(tmp_path: Path) -> None:
    def distilled(seed: int, classes: int) -> Any:
        torch.manual_seed(seed)
        return timm.create_model("deit_tiny_distilled_patch16_224", **{**SIZES, "num_classes": classes}).eval()

    model, drawn = distilled(1, 5), distilled(1, 5)
    svite_scale.load_weights(model, saved(distilled(0, 7), tmp_path / "w.safetensors"))
    for head in ("head", "head_dist"):
        assert torch.equal(model.get_submodule(head).weight, drawn.get_submodule(head).weight)
    assert not torch.equal(model.norm.weight + model.cls_token, drawn.norm.weight + drawn.cls_token)


def test_token_selectors_are_read_where_the_file_has_them(tmp_path: Path) -> None:
    source, model = vit(0), vit(1)
    path = saved(source, tmp_path / "without.safetensors")
    svite_scale.insert_token_selectors(model, keep=0.5)
    drawn = {name: tensor.clone() for name, tensor in model.blocks.selector0.state_dict().items()}
    svite_scale.load_weights(model, path)
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in model.blocks.selector0.state_dict().items())
    assert torch.equal(model.norm.bias, source.norm.bias)
    svite_scale.insert_token_selectors(source, keep=0.5)
    path = saved(source, tmp_path / "with.safetensors")
    svite_scale.load_weights(model, path)
    learnt = source.blocks.selector0.state_dict()
    assert all(torch.equal(tensor, learnt[name]) for name, tensor in model.blocks.selector0.state_dict().items())
    with pytest.raises(OptionError, match=r"the model has no blocks\.selector0\.atten.*; use .*, and the token selectors that"):
        svite_scale.load_weights(vit(1), path)


def with_state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = dict(vit(0).state_dict())
        change(state)
        save_file(state, path)

    return write


def as_pth(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = dict(vit(0).state_dict())
        torch.save(change(state), path.with_suffix(".pth"))

    return write


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda path: None, "is no file; check the path; give a timm model's state_dict() as .saf"),
    "folder": (lambda path: path.mkdir(), "is a folder without model.safetensors; give"),
    "junk": (lambda path: path.write_bytes(b"junk" * 9), "can't be read as a state dict ("),
    "numbers": (lambda path: torch.save([1, 2], path.with_suffix(".pth")), "can't be read as a state dict ("),
    "no tensors": (lambda path: torch.save({"model": {"a": 1}}, path.with_suffix(".pth")), "can't be read as a state dict ("),
    "average alone": (
        as_pth(lambda state: {"model_ema": state, "epoch": 3}),
        "can't be read as a state dict (it is no dict of tensors, and has none under state_dict or model; its keys are "
        "'model_ema', 'epoch'; save what is under 'model_ema' alone, by torch.save); give",
    ),
    "sparse": (
        as_pth(lambda state: {**state, "head.weight": state["head.weight"].to_sparse()}),
        "can't be read as a state dict (its tensor head.weight is of the layout torch.sparse_coo; save ordinary dense tensors)",
    ),
    "meta": (
        as_pth(lambda state: {**state, "head.weight": state["head.weight"].to("meta")}),
        "can't be read as a state dict (its tensor head.weight is on the meta device, without values; save ordinary dense ten",
    ),
    "not finite": (
        with_state(lambda state: state.update({"norm.bias": torch.full((24,), torch.inf)})),
        "its tensor norm.bias has values that aren't finite; use an earlier checkpoint",
    ),
    "missing": (
        with_state(lambda state: (state.pop("norm.bias"), state.pop("cls_token"))),
        "isn't of this vit_tiny_patch16_224: it has no cls_token, norm.bias; use the model that it was saved from",
    ),
    "unknown": (
        with_state(lambda state: state.update({f"extra.{number}": torch.ones(1) for number in range(6)})),
        "isn't of this vit_tiny_patch16_224: the model has no extra.0, extra.1, extra.2, extra.3 and 2 more; use",
    ),
    "shape": (
        with_state(lambda state: state.update({"norm.bias": torch.ones(25)})),
        "isn't of this vit_tiny_patch16_224: of other shapes norm.bias [25] instead of [24]; use",
    ),
    "odd positions": (
        with_state(lambda state: state.update(pos_embed=torch.ones(1, 13, 24))),
        "isn't of this vit_tiny_patch16_224: of other shapes pos_embed [1, 13, 24] instead of [1, 17, 24]; use",
    ),
    "whole numbers": (
        with_state(lambda state: state.update({"norm.bias": torch.ones(24, dtype=torch.int8)})),
        "its tensor norm.bias is of torch.int8, the model's of torch.float32; give",
    ),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch's own, of a file with such tensors
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_doesnt_fit_is_refused_in_one_line(tmp_path: Path, mistake: str) -> None:
    write, message = MISTAKES[mistake]
    path = tmp_path / "w.safetensors"
    write(path)
    path = next(tmp_path.iterdir(), path)
    with pytest.raises(OptionError, match=re.escape(f"weights = {str(path)!r}: {message}")) as caught:
        svite_scale.load_weights(vit(1), path)
    assert "\n" not in str(caught.value)


def test_weights_come_before_sparsify(tmp_path: Path) -> None:
    path, model = saved(vit(0), tmp_path / "w.safetensors"), vit(1)
    svite_scale.sparsify(model, density=0.5)
    with pytest.raises(OptionError, match=r"can't be loaded into a sparse model; load them before sparsify$"):
        svite_scale.load_weights(model, path)


def numpy_weights(model: nn.Module) -> dict[str, Any]:
    return {
        name.removesuffix(".weight"): tensor.detach().numpy().copy()
        for name, tensor in model.named_parameters()
        if tensor.dim() > 1 and name.endswith(".weight")
    }


def masks_of(model: nn.Module) -> dict[str, Any]:
    """By name of a packed layer, its mask in the shape of its weight, unpacked by numpy."""
    return {
        name: np.unpackbits(layer.mask.numpy(), count=layer.shape.numel(), bitorder="little").reshape(layer.shape) == 1
        for name, layer in packed_layers(model).items()
    }


def test_zeros_of_a_pruned_model_are_inactive_in_exact_numbers() -> None:
    model, images = pruned(vit(0)), torch.randn(2, 3, 16, 16)
    weights, expected = numpy_weights(model), model(images)
    plan = svite_scale.sparsify(model, masks="from_weights")
    assert {entry.name: entry.num_active for entry in plan} == {name: np.count_nonzero(w) for name, w in weights.items()}
    masks = masks_of(model)
    assert masks.keys() == {name for name in weights if name.startswith("blocks")}
    assert all((mask == (weights[name] != 0)).all() for name, mask in masks.items())
    assert type(model.head) is nn.Linear
    torch.testing.assert_close(model(images), expected)


def test_masks_from_weights_need_zeros_and_other_weights() -> None:
    with pytest.raises(SparsifyError, match=r"masks = 'from_weights': no weight is 0, so this model isn't pruned; give a dens"):
        svite_scale.sparsify(vit(0), masks="from_weights")
    model = pruned(vit(0))
    nn.init.zeros_(model.blocks[1].mlp.fc1.weight)
    with pytest.raises(SparsifyError, match=r"all weights of blocks\.1\.mlp\.fc1 are 0, and no .*; list .* in keep_dense"):
        svite_scale.sparsify(model, masks="from_weights")
    assert not packed_layers(model)
    plan = svite_scale.sparsify(model, masks="from_weights", keep_dense=["blocks.1.mlp.fc1"])
    assert [entry.name for entry in plan if entry.kept_dense] == ["blocks.1.mlp.fc1"]
    with torch.device("meta"):
        model = vit(0)
    with pytest.raises(SparsifyError, match=r"is on the meta device, where no zeros can be found; load the weights first"):
        svite_scale.sparsify(model, masks="from_weights")


def test_the_largest_weights_of_each_layer_are_active_by_magnitude() -> None:
    model = vit(0)
    nn.init.constant_(model.blocks[0].attn.proj.weight, -0.5)  # ties
    weights = numpy_weights(model)
    plan = svite_scale.sparsify(model, 0.3, by_magnitude=True)
    for name, mask in masks_of(model).items():
        k = next(entry.num_active for entry in plan if entry.name == name)
        chosen = np.argsort(-np.abs(weights[name].ravel()), kind="stable")[:k]
        assert set(np.flatnonzero(mask).tolist()) == set(chosen.tolist()), name
        assert torch.equal(model.get_submodule(name).dense_weight(), torch.from_numpy(weights[name] * mask))


def test_by_magnitude_refuses_masks_and_nan() -> None:
    with pytest.raises(OptionError, match=r"by_magnitude = True: isn't used where masks is given; leave it out"):
        svite_scale.sparsify(vit(0), masks="from_weights", by_magnitude=True)
    model = vit(0)
    nn.init.constant_(model.blocks[0].mlp.fc1.weight[:1], torch.nan)
    with pytest.raises(TopologyError, match=r"24 of .* scores are NaN"):
        svite_scale.sparsify(model, 0.3, by_magnitude=True)


def unit_magnitudes(model: Any, block: int) -> tuple[Any, Any]:
    """Of heads and of neurons, in float64."""
    attn, mlp = model.blocks[block].attn, model.blocks[block].mlp
    qkv, proj, fc1, fc2 = (layer.weight.detach().double().numpy() for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
    heads = np.zeros(4)
    for head in range(4):
        rows = np.concatenate([np.arange(6) + 24 * part + 6 * head for part in range(3)])
        if np.abs(qkv[rows]).sum() > 0:
            heads[head] = np.abs(qkv[rows]).sum() + np.abs(proj[:, 6 * head : 6 * head + 6]).sum()
    neurons = np.abs(fc1).sum(axis=1) + np.abs(fc2).sum(axis=0)
    neurons[np.abs(fc1).sum(axis=1) == 0] = 0
    return heads, neurons


def test_the_largest_heads_and_neurons_are_active_by_magnitude() -> None:
    model = vit(0)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.view(3, 4, 6, 24)[:, 2] = 0  # of no effect, though its columns are large
        model.blocks[0].attn.proj.weight[:, 12:18] = 9
        model.blocks[1].mlp.fc1.weight[::3] = 0
        model.blocks[1].mlp.fc2.weight[:, 1] *= 50
    magnitudes = [unit_magnitudes(model, block) for block in range(2)]
    assert magnitudes[0][0][2] == 0
    svite_scale.pack_units(model, heads=0.5, neurons=0.6, by_magnitude=True)
    for name, layer in sparse_layers(model).items():
        expected = magnitudes[int(name.split(".")[1])][0 if layer.unit == "heads" else 1]
        k = int((0.5 if layer.unit == "heads" else 0.6) * expected.size)
        active = bits.unpack(layer.mask, expected.size).numpy()
        assert set(np.flatnonzero(active)) == set(np.argsort(-expected, kind="stable")[:k]), name


def sparse(path: Path, build: Callable[..., SparseModel] = build_sparse, **options: Any) -> SparseModel:
    """A config's model that starts from a file; ``options`` are of its sparsity, and ``model`` of the dense model."""
    model = ModelConfig(**{**CONFIG, "weights": str(path), **options.pop("model", {})})
    sparsity = SparseModelOptions(**options)
    return build_sparse(model, sparsity, seed=3) if build is build_sparse else build(model, sparsity)


OPTIONS: dict[str, dict[str, Any]] = {
    "zeros": {"masks": "from_weights"},
    "zeros, and a new head": {"masks": "from_weights", "model": {"num_classes": 5}},
    "zeros, other images": {"masks": "from_weights", "model": {"in_channels": 1, "image_size": 24}},
    "magnitude": {"density": 0.3},
    "units": {"structured": StructuredConfig(heads=0.5, neurons=0.5), "masks": "from_weights"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_plan_on_the_meta_device_is_what_is_built(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    source = pruned(vit(0))
    with torch.no_grad():  # whose sum over channels isn't 0 where one of them is
        source.patch_embed.proj.weight[:, 1, ::2] = 0
        source.patch_embed.proj.weight[3:5] = 0
        source.head.weight[:, ::2] = 0
    path = saved(source, tmp_path / "w.safetensors")
    built, planned = (sparse(path, build, **OPTIONS[case]) for build in (build_sparse, plan_sparse))
    assert built.layers == planned.layers
    assert any(entry.is_packed for entry in built.layers)
    assert all(tensor.is_meta for tensor in planned.model.parameters())
    assert len(lines_of(caplog)) == {"zeros, and a new head": 1, "zeros, other images": 2}.get(case, 0)
    embedding = next(entry for entry in built.layers if entry.name == "patch_embed.proj")
    if "zeros" in case:
        head = next(entry for entry in built.layers if entry.name == "head")
        assert (head.num_active == head.numel) == ("new head" in case)
        weight = source.patch_embed.proj.weight.detach().numpy()
        summed = weight.sum(axis=1) if "images" in case else weight
        assert embedding.num_active == np.count_nonzero(summed)


def test_a_model_of_a_config_has_the_function_of_its_weights(tmp_path: Path) -> None:
    source, images = pruned(vit(0)), torch.randn(2, 3, 16, 16)
    model, _ = sparse(saved(source, tmp_path / "w.safetensors"), masks="from_weights")
    torch.testing.assert_close(model.eval()(images), source(images))


def test_a_config_with_weights_and_a_density_begins_with_the_largest(tmp_path: Path) -> None:
    source = vit(0)
    model, _ = sparse(saved(source, tmp_path / "w.safetensors"), density=0.3)
    svite_scale.sparsify(source, 0.3, by_magnitude=True)
    masks, expected = masks_of(model), masks_of(source)
    assert masks.keys() == expected.keys()
    assert all((masks[name] == expected[name]).all() for name in masks)


def test_from_weights_without_weights_and_beside_a_density_is_refused(tmp_path: Path) -> None:
    message = r"sparsity\.masks = 'from_weights': takes the zeros of model\.weights, which is null; set model\.weights"
    with pytest.raises(ConfigError, match=message):
        plan_sparse(ModelConfig(**CONFIG), SparseModelOptions(masks="from_weights"))
    for name, value in (("density", 0.5), ("densities", {"*": 0.5})):
        with pytest.raises(OptionError, match=name):
            SparseModelOptions(masks="from_weights", **{name: value})
    with pytest.raises(ConfigError, match=r"^model\.weights = '.*none\.pth': is no file"):
        sparse(tmp_path / "none.pth", plan_sparse, density=0.5)
    dense = saved(vit(0), tmp_path / "dense.safetensors")
    with pytest.raises(ConfigError, match=r"^sparsity\.masks = 'from_weights': no weight is 0"):
        sparse(dense, plan_sparse, masks="from_weights")


def test_a_checkpoints_counts_take_the_place_of_weights_and_masks(caplog: pytest.LogCaptureFixture) -> None:
    """As for a run whose files are gone: the checkpoint fills the model."""
    saved_counts = {"blocks.0.mlp.fc1": 100, "blocks.1.attn.qkv": 7}
    config = ModelConfig(**CONFIG, weights="gone.safetensors")
    for masks in ("from_weights", "gone.masks"):
        built = build_sparse(config, SparseModelOptions(masks=masks), 3, saved_counts)
        planned = plan_sparse(config, SparseModelOptions(masks=masks), saved_counts)
        assert built.layers == planned.layers
        assert {name: layer.num_active for name, layer in packed_layers(built.model).items()} == saved_counts
    assert not lines_of(caplog)
    assert logging.getLogger("svite_scale").isEnabledFor(logging.WARNING)
