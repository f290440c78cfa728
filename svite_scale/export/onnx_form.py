"""The form ``onnx``: one file for ONNX runtimes, of the dense or of the sliced model, in fp32 or in 8 bits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svite_scale.errors import ExportError
from svite_scale.export.form import Description, Export, Notes
from svite_scale.export.quantization import accuracies, calibration_images, quantize
from svite_scale.export.sliced_form import is_smaller, slice_model
from svite_scale.sparsity.dense import to_dense

FILE = "model.onnx"
OPSET = 20
"""The first with GELU as one operator; onnxruntime has it since version 1.17."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights above which they go into a second file, because one file of ONNX ends at 2 GB."""


class FlatLinear(nn.Linear):
    """A linear layer that multiplies two matrices, whatever the shape of its input.

    ONNX has one operator for that, Gemm. Other inputs become MatMul and Add, which runtimes run slower, and don't quantize as
    one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class OnnxModel(nn.Module):
    """A model of onnxruntime, on the CPU, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        """``path`` is that of the ``.onnx`` file."""
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait by spinning would take the cores from torch's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """fp32 ``[B, C, H, W]``, normalised, to logits ``[B, classes]``."""
        (logits,) = self.session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)


def write(export: Export, folder: Path) -> Notes:
    """Writes ``model.onnx``; see :class:`~svite_scale.export.formats.OnnxOptions`.

    Raises:
        ExportError: onnx, onnxruntime or onnxscript isn't installed.
        ConfigError: the number of images to calibrate 8 bits on is below 1.
        RunError, DataError: they can't be read.
    """
    _require("onnx", "onnxruntime", "onnxscript")
    options = export.onnx
    if options.int8 is not None:  # before the conversion, which takes a while
        config = export.run.evaluation_config()
        images = calibration_images(config, options.int8)
    sliced = is_smaller(export.model) if options.form is None else options.form == "sliced"
    model = slice_model(export.model, export.description.model) if sliced else to_dense(export.model)
    with torch.inference_mode():
        expected = model(export.example)
    facts = {"Converted model": "sliced, without absent heads, neurons and tokens" if sliced else "dense, zeros where inactive"}
    limits = ["onnxruntime must be of version 1.17 or newer."]
    with TemporaryDirectory(dir=folder) as temporary:
        in_fp32 = (folder if options.int8 is None else Path(temporary)) / FILE
        convert(model, export.example, in_fp32)
        difference = (OnnxModel(in_fp32)(export.example) - expected).abs().max().item()
        facts["Logits in fp32"] = f"differ from PyTorch's by {difference:.1e} at most, on two images of noise"
        if options.int8 is not None:
            quantize(in_fp32, folder / FILE, images, external_data=_needs_second_file(model))
            in_fp32_and_int8 = {"fp32": OnnxModel(in_fp32), "int8": OnnxModel(folder / FILE)}
            for name, accuracy in accuracies(in_fp32_and_int8, config).items():
                facts[f"Accuracy in {name}, by onnxruntime"] = f"{accuracy:.4f}"
            facts["int8 calibrated on"] = f"{len(images)} evaluation images"
            limits.append(
                "An x86 processor without the instructions VNNI or AMX cuts off large sums of int8 products. Measure the "
                "accuracy there again."
            )
    return Notes(USAGE, facts, tuple(limits))


def read(folder: Path, description: Description) -> nn.Module:
    """Returns the model, run by onnxruntime.

    Raises:
        ExportError: the file can't be read, or takes weights from outside the folder; or onnx or onnxruntime isn't installed.
    """
    _require("onnx", "onnxruntime")
    import onnx

    try:
        # Refuses weights in other folders, which onnxruntime 1.23 would read.
        onnx.load(folder / FILE)
        return OnnxModel(folder / FILE)
    except Exception as error:  # of onnxruntime's own kinds
        raise ExportError(f"{folder / FILE} can't be read ({error}); export the model again") from error


def _require(*libraries: str) -> None:
    for library in libraries:
        if find_spec(library) is None:
            raise ExportError(f"--format onnx: {library} isn't installed; pip install 'svite_scale[export]'")


def convert(model: nn.Module, example: Tensor, path: Path) -> None:
    """Writes a dense or sliced model as ONNX, for batches of any size.

    Args:
        model: in evaluation mode, on the CPU; its linear layers and its attention are changed.
        example: images, fp32 ``[2, C, H, W]``.
        path: of the file.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FlatLinear
        if hasattr(module, "fused_attn"):
            # torch 2.15 can't convert fused attention with a bias, such as BEiT's.
            cast(Any, module).fused_attn = False
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=_needs_second_file(model))


def _needs_second_file(model: nn.Module) -> bool:
    return sum(each.numel() * each.element_size() for each in model.state_dict().values()) > LARGEST_FILE


def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Returns ONNX's values and indices of torch's stable sort; in TopK, ties go to the lower index."""
    from onnxscript import opset20 as op

    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


USAGE = """\
With [onnxruntime](https://onnxruntime.ai), from this folder:

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, {"images": images})  # normalised float32 [B, C, H, W], for example of numpy
```
"""
