"""What is to be drawn, in numbers, against the files of runs that one process and two ranks saved."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svite_scale.report.layers import last_update, layer_densities, picture_of_units, split_name, unit_histories
from svite_scale.report.patches import DARK_BLUE, DIMMED, dimmed, picture_of_image
from svite_scale.report.reported_run import Curve, read_reported_run
from svite_scale.saved_run import evaluation_images, load_model, read_run
from tests.report.by_hand import NUM_UNITS, tensors, unit_masks, unpacked
from tests.runs import json_lines
from tests.tiny import NUM_VAL

ENGINES = ["single", "fsdp2"]
Saved = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("engine", ENGINES)
def test_load_model_has_the_tensors_of_the_checkpoint(saved: Saved, engine: str) -> None:
    run = read_run(saved(engine))
    assert (run.step, run.checkpoint.name) == (20, "step-00000020")
    by_hand, model = tensors(run.checkpoint), load_model(run)
    assert by_hand.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy().ravel(), by_hand[name], err_msg=name)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("engine", ENGINES)
def test_unit_histories_end_with_the_masks_of_the_checkpoint(saved: Saved, engine: str) -> None:
    run = read_run(saved(engine))
    histories = unit_histories(load_model(run), run.topology, Path())
    lines, masks = json_lines(saved(engine) / "topology.jsonl"), unit_masks(run.checkpoint)
    assert [line["step"] for line in run.topology] == [0, 4, 8, 12, 16]
    assert {history.layer: history.unit for history in histories} == {name: name.rpartition(".")[2] for name in masks}
    for history in histories:
        num_units = NUM_UNITS[history.unit]
        assert (history.active.shape, history.active.dtype) == ((num_units, 5), np.bool_)
        np.testing.assert_array_equal(history.active[:, -1], masks[history.layer], err_msg=history.layer)
        for column, line in zip(history.active.T, lines, strict=True):
            packed = np.frombuffer(bytes.fromhex(line["masks"][history.layer]), np.uint8)
            np.testing.assert_array_equal(column, unpacked(packed, num_units))
    assert any((history.active[:, 0] != history.active[:, -1]).any() for history in histories)


def test_an_older_checkpoint_shows_nothing_of_later_steps(saved: Saved) -> None:
    run = read_run(saved("single"), "step-00000010")
    assert run.step == 10
    assert [line["step"] for line in run.topology] == [0, 4, 8]
    assert [line["step"] for line in run.metrics] == list(range(1, 11))
    masks = unit_masks(run.checkpoint)
    for history in unit_histories(load_model(run), run.topology, Path()):
        np.testing.assert_array_equal(history.active[:, -1], masks[history.layer])


@pytest.mark.parametrize("engine", ENGINES)
def test_layer_densities_of_units_are_those_of_the_masks(saved: Saved, engine: str) -> None:
    run = read_run(saved(engine))
    found = layer_densities(load_model(run))
    assert found == {name: mask.mean() for name, mask in unit_masks(run.checkpoint).items()}
    assert sorted(set(found.values())) == [4 / 8, 76 / 128]


def test_layer_densities_of_weights_are_those_of_the_masks(saved: Saved) -> None:
    run = read_run(saved("weights"))
    by_hand, densities = tensors(run.checkpoint), layer_densities(load_model(run))
    assert list(densities) == [name.removesuffix(".mask") for name in by_hand if name.endswith(".mask")]
    assert len({*densities.values()}) > 1, "ERK tells layers apart"
    for layer, density in densities.items():
        size = {"qkv": 32 * 96, "proj": 32 * (16 if "patch" in layer else 32), "fc1": 32 * 128, "fc2": 32 * 128}
        numel = size.get(layer.rpartition(".")[2], 320)
        assert density == unpacked(by_hand[f"{layer}.mask"], numel).sum() / numel
    assert unit_histories(load_model(run), run.topology, Path()) == []


def test_layer_densities_of_blocks_are_those_of_the_masks(saved: Saved) -> None:
    run = read_run(saved("blocks"))
    by_hand, densities = tensors(run.checkpoint), layer_densities(load_model(run))
    assert densities.keys() == {name.removesuffix(".mask") for name in by_hand if name.endswith(".mask")}
    num_blocks = {"qkv": 6 * 8, "proj": 2 * 8, "fc1": 8 * 8, "fc2": 2 * 32}
    for layer in densities.keys() - {"patch_embed.proj", "head"}:
        count = num_blocks[layer.rpartition(".")[2]]
        assert by_hand[f"{layer}.mask"].size == count // 8
        assert densities[layer] == unpacked(by_hand[f"{layer}.mask"], count).sum() / count == 0.5
        assert by_hand[f"{layer}.values"].size == 16 * 4 * count // 2


@pytest.mark.parametrize(("name", "metrics"), [("single", ["heads/ever_active", "neurons/ever_active"]), ("weights", ["loss"])])
def test_a_curve_has_every_line_with_the_metric(saved: Saved, name: str, metrics: list[str]) -> None:
    lines, run = json_lines(saved(name) / "metrics.jsonl"), read_reported_run(saved(name), None, None)
    for metric in (*metrics, "eval_accuracy", "drop_fraction"):
        having = [line for line in lines if metric in line]
        assert having
        assert run.curve(metric) == Curve([line["step"] for line in having], [line[metric] for line in having])
    assert run.curve("loss ") == Curve([], [])


def test_a_curve_leaves_out_what_is_not_finite_and_takes_old_names(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((saved("weights") / "config.yaml").read_text())
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "drop_rate": 0.5, "loss": NaN}\n{"step": 2, "drop_fraction": 0.25, "loss": 2}\n'
        '{"step": 3, "loss": Infinity}\n'
    )
    run = read_reported_run(tmp_path, None, None)
    assert run.curve("drop_fraction") == Curve([1, 2], [0.5, 0.25])
    assert run.curve("loss") == Curve([2], [2.0])


def test_the_survival_of_the_grown_is_the_mean_over_the_layers_of_a_kind_of_unit(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((saved("tokens") / "config.yaml").read_text())
    survivals = {"blocks.0.attn.heads": 0.5, "blocks.1.attn.heads": 1.0, "patch_embed.proj": 0.25, "head": 0.125, "other": 0.75}
    line = {"step": 1} | {f"layers/grown_survival/{layer}": value for layer, value in survivals.items()}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    run = read_reported_run(tmp_path, None, None)
    found = {prefix: run.curve(f"{prefix}grown_survival").values for prefix in ("", "blocks/", "heads/", "neurons/")}
    assert found == {"": [0.125], "blocks/": [0.25], "heads/": [0.75], "neurons/": []}


def test_last_update_has_the_figures_of_each_layer(saved: Saved) -> None:
    lines = json_lines(saved("weights") / "metrics.jsonl")
    update = [line for line in lines if "ever_active" in line][-1]
    found = last_update(lines, "ever_active")
    assert found == {name.split("/")[2]: value for name, value in update.items() if name.startswith("layers/ever_active/")}
    assert found.keys() == layer_densities(load_model(read_run(saved("weights")))).keys()
    assert last_update(lines, "ever") == {}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("blocks.11.attn.qkv", ("11", "attn.qkv")),
        ("stages.0.blocks.2.mlp.fc1", ("stages.0.2", "mlp.fc1")),
        ("patch_embed.proj", ("", "patch_embed.proj")),
        ("stem.0", ("", "stem.0")),
    ],
)
def test_split_name_tells_the_block_from_the_layer(layer: str, expected: tuple[str, str]) -> None:
    assert split_name(layer) == expected


def test_picture_of_units_shows_each_unit_and_update() -> None:
    active = np.random.default_rng(0).random((5, 7)) < 0.5
    shown = np.asarray(Image.open(io.BytesIO(picture_of_units(active))))
    np.testing.assert_array_equal(shown[..., 3], np.where(active, 255, 0))


def test_picture_of_units_shows_means_of_many_units_longest_active_first() -> None:
    active = np.zeros((128, 3), dtype=bool)
    active[::2] = True  # each second one always, and one of them later
    active[4] = [False, True, True]
    shown = np.asarray(Image.open(io.BytesIO(picture_of_units(active))))[..., 3]
    assert shown.shape == (64, 3)
    np.testing.assert_array_equal(shown[:31], 255)
    np.testing.assert_array_equal(shown[31], [128, 255, 255])
    np.testing.assert_array_equal(shown[32:], 0)


def test_picture_of_a_small_image_is_exact() -> None:
    image = np.random.default_rng(0).random((8, 12, 3), dtype=np.float32)
    shown = np.asarray(Image.open(io.BytesIO(picture_of_image(image))))
    np.testing.assert_allclose(shown / 255, image, atol=0.5 / 255 + 1e-6)


def evaluation_samples(shards: Path) -> list[tuple[np.ndarray[tuple[int, int], np.dtype[np.uint8]], int]]:
    """Pixels and label of each sample, read from the tars."""
    samples = []
    for shard in sorted(shards.glob("val-*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".png"):
                samples.append((np.asarray(Image.open(io.BytesIO(content))), int(members[name.replace(".png", ".cls")])))
    assert len(samples) == NUM_VAL
    return samples


@pytest.mark.parametrize(("count", "expected"), [(4, [0, 9, 18, 27]), (1, [0]), (100, list(range(NUM_VAL)))])
def test_evaluation_images_are_those_of_the_shards(saved: Saved, count: int, expected: list[int]) -> None:
    run_dir = saved("single")
    images, samples = evaluation_images(read_run(run_dir).config, count), evaluation_samples(run_dir.parent / "digits")
    assert images.samples.tolist() == expected
    assert images.labels.tolist() == [samples[number][1] for number in expected]
    for number, pixels, inputs in zip(expected, images.pixels.numpy(), images.inputs.numpy(), strict=True):
        np.testing.assert_array_equal(pixels, samples[number][0][None])
        np.testing.assert_allclose(inputs, (samples[number][0][None] / 255 - 0.3) / 0.35, rtol=1e-4, atol=1e-5)


def test_dimmed_fades_dropped_patches_and_leaves_kept_ones() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6), dtype=np.uint8)
    kept = np.array([[True, False, False, True, True, False], [False] * 6])
    found = dimmed(pixels, kept, (2, 3))
    whole = pixels.transpose(0, 2, 3, 1) / 255
    faded = DIMMED * whole + (1 - DIMMED) * DARK_BLUE
    assert found.shape == (2, 4, 6, 3)
    for patch in range(6):
        area = np.s_[0, patch // 3 * 2 : patch // 3 * 2 + 2, patch % 3 * 2 : patch % 3 * 2 + 2]
        np.testing.assert_allclose(found[area], (whole if kept[0, patch] else faded)[area], rtol=1e-5)
    np.testing.assert_allclose(found[1], faded[1], rtol=1e-5)
    grey = dimmed(pixels[:, :1], np.ones_like(kept), (2, 3))
    np.testing.assert_allclose(grey, pixels[:, [0, 0, 0]].transpose(0, 2, 3, 1) / 255, rtol=1e-5)
