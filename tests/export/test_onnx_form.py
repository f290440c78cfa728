"""The form onnx: one file of the sliced or the dense model, that onnxruntime answers from as the run's model does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from svite_scale.errors import ConfigError, ExportError
from svite_scale.export import onnx_form
from svite_scale.export.form import Export, Notes, describe
from svite_scale.export.formats import OnnxOptions
from svite_scale.export.read import read_export
from svite_scale.export.write import export_run
from svite_scale.saved_run import evaluation_images, load_model, read_run
from tests.tiny import NUM_VAL

Saved = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def sliced(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with absent heads, neurons and tokens."""
    return export_run(read_run(saved("tokens")), "onnx", tmp_path_factory.mktemp("sliced") / "out")


@pytest.fixture(scope="module")
def in_int8(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes]:
    """The run whose single weights are sparse, as if it had 2 GB of weights, with what its card will say."""
    folder, run = tmp_path_factory.mktemp("int8"), read_run(saved("weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_form, "LARGEST_FILE", 0)
        export = Export(run, load_model(run), describe(run, "onnx"), OnnxOptions(form="dense", int8=16))
        return folder, onnx_form.write(export, folder)


def graph_of(folder: Path) -> onnx.GraphProto:
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def logits_by_onnxruntime(folder: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (logits,) = session.run(["logits"], {"images": images})
    return logits


def test_onnxruntime_gives_the_logits_of_the_run_for_batches_of_any_size(saved: Saved, sliced: Path) -> None:
    run = read_run(saved("tokens"))
    images = evaluation_images(run.config, NUM_VAL).inputs
    with torch.inference_mode():
        expected = load_model(run)(images)
    assert expected.std(dim=0).min() > 1e-3, "or the images had no part in it"
    for count in (1, 2, NUM_VAL):
        found = logits_by_onnxruntime(sliced, images[:count].numpy())
        np.testing.assert_allclose(found, expected[:count].numpy(), atol=1e-5, rtol=0)
    torch.testing.assert_close(read_export(sliced).model(images), expected, atol=1e-5, rtol=0)


def test_one_file_holds_the_smaller_model_with_linear_layers_as_gemm(sliced: Path) -> None:
    assert sorted(path.name for path in sliced.iterdir()) == ["README.md", "export.json", "model.onnx"]
    graph = graph_of(sliced)
    sizes = {each.name: list(each.dims) for each in graph.initializer}
    products = [[sizes.get(name) for name in node.input] for node in graph.node if node.op_type == "MatMul"]
    assert not any(size for pair in products for size in pair), "a product with a weight"
    gemms = Counter(str(sizes[node.input[1]]) for node in graph.node if node.op_type == "Gemm")
    # 1 of 2 heads of width 16, int(0.6 * 128) = 76 neurons, 10 classes.
    assert gemms == {"[48, 32]": 2, "[32, 16]": 2, "[76, 32]": 2, "[32, 76]": 2, "[10, 32]": 1}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch has no fixed size"


def test_products_with_weights_are_quantized(in_int8: tuple[Path, Notes]) -> None:
    graph = graph_of(in_int8[0])
    types = {each.name: each.data_type for each in graph.initializer}
    of_output = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Gemm", "Conv")]
    assert len(products) == 2 * 4 + 1 + 1
    for product in products:
        activation, weight = (of_output[name] for name in product.input[:2])
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert types[weight.input[0]] == onnx.TensorProto.INT8


def test_card_has_the_accuracy_in_int8_beside_that_in_fp32(saved: Saved, in_int8: tuple[Path, Notes]) -> None:
    run, (folder, notes) = read_run(saved("weights")), in_int8
    images = evaluation_images(run.config, NUM_VAL)
    with torch.inference_mode():
        logits = {"fp32": load_model(run)(images.inputs).numpy(), "int8": logits_by_onnxruntime(folder, images.inputs.numpy())}
    assert not np.array_equal(logits["fp32"], logits["int8"])
    assert np.abs(logits["fp32"] - logits["int8"]).max() < 0.2 * np.abs(logits["fp32"]).max()
    for name, each in logits.items():
        accuracy = np.mean(each.argmax(axis=1) == images.labels.numpy())
        assert notes.facts[f"Accuracy in {name}, by onnxruntime"] == f"{accuracy:.4f}"
    assert notes.facts["int8 calibrated on"] == "16 evaluation images"


def test_weights_of_two_gigabytes_go_into_a_second_file(in_int8: tuple[Path, Notes]) -> None:
    assert sorted(path.name for path in in_int8[0].iterdir()) == ["model.onnx", "model.onnx.data"]


def test_calibration_without_images_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--int8 = 0: is no number of images; use 1 or more"):
        export_run(read_run(saved("weights")), "onnx", tmp_path / "out", onnx=OnnxOptions(int8=0))


def test_damaged_file_is_refused(sliced: Path, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text((sliced / "export.json").read_text())
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=rf"^{tmp_path}/model.onnx can't be read"):
        read_export(tmp_path)


@pytest.mark.parametrize("absolute", [True, False])
def test_weights_outside_the_folder_are_refused(sliced: Path, tmp_path: Path, absolute: bool) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_bytes(bytes(400))
    weight = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[10, 10])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=str(secret) if absolute else "../secret")
    gemm = helper.make_node("Gemm", ["images", "weight"], ["logits"])
    images, logits = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 10]) for name in ("images", "logits"))
    model = helper.make_model(
        helper.make_graph([gemm], "graph", [images], [logits], [weight]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "export.json").write_text((sliced / "export.json").read_text())
    with pytest.raises(ExportError, match=rf"^{folder}/model.onnx can't be read"):
        read_export(folder)
