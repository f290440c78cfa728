"""Static quantization of an ONNX model to 8 bits, and what it costs in accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svite_scale.config.schema import Config
from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.errors import ConfigError
from svite_scale.saved_run import evaluation_images
from svite_scale.tracking.progress import track
from svite_scale.train.evaluate import score

OPERATORS = ["Gemm", "Conv"]
"""What is quantized: the products with weights."""


def calibration_images(config: Config, count: int) -> Tensor:
    """Returns evaluation images, spread over the shards, normalised fp32 ``[B, C, H, W]``; B is ``count``, or less if all are.

    Raises:
        ConfigError: the count is below 1.
        DataError: the images can't be read.
    """
    if count < 1:
        raise ConfigError("--int8", count, "is no number of images", "use 1 or more, such as 100")
    return evaluation_images(config, count).inputs


def quantize(in_fp32: Path, out: Path, images: Tensor, *, external_data: bool) -> None:
    """Writes an ONNX model with weights and inputs of products in 8 bits, as pairs of QuantizeLinear and DequantizeLinear.

    Weights are int8, with one scale per output channel. Inputs are uint8, with one scale and zero point per tensor, from its
    least and its greatest value on the images.

    Args:
        in_fp32: the file of the model.
        out: the file to write.
        images: to calibrate on, normalised fp32 ``[B, C, H, W]``.
        external_data: whether the weights go into a file of their own.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory(dir=out.parent) as temporary:
        prepared = Path(temporary) / in_fp32.name
        quant_pre_process(in_fp32, prepared, skip_symbolic_shape=True, save_as_external_data=external_data)
        quantize_static(
            prepared,
            out,
            _reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=OPERATORS,
            use_external_data_format=external_data,
        )


def _reader(images: Tensor) -> Any:
    """Returns onnxruntime's reader of images, one by one."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        inputs: Iterator[Tensor] = track(images.split(1), "calibrate", len(images), "images")

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.inputs, None)
            return None if image is None else {"images": image.numpy()}

    return Reader()


def accuracies(models: Mapping[str, nn.Module], config: Config) -> dict[str, float]:
    """Returns, by name, the accuracy of models on all evaluation images, which are read once.

    Raises:
        DataError: the images can't be read, or too many of them can't be decoded.
    """
    model = config.model
    shape = (model.in_channels, model.image_size, model.image_size)
    data = EvalData(config.data, image_shape=shape, batch_size=config.train.eval_batch_size)
    transform = DeviceTransform(config.data, model.num_classes, torch.device("cpu"), training=False)
    correct, valid, damaged = dict.fromkeys(models, 0), 0, 0
    for batch in track(data, "evaluate", -(-data.num_samples // config.train.eval_batch_size), "batches"):
        images, _ = transform(batch.images, batch.labels)
        accepted = F.one_hot(batch.labels, model.num_classes).bool()
        valid, damaged = valid + int(batch.valid.sum()), damaged + int(batch.damaged.sum())
        for name, each in models.items():
            correct[name] += int((score(each(images), accepted).top1 & batch.valid).sum())
    data.damage.check(damaged, valid + damaged)
    return {name: count / valid for name, count in correct.items()}
