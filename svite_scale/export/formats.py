"""The names of the forms that a model is exported in, and their options, without torch: for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORMATS = {
    "timm": "ordinary dense weights for timm.create_model, zeros included",
    "sliced": "a physically smaller model, without absent heads, neurons and tokens",
    "packed": "the active weights and a bitmask, as small as the density",
    "onnx": "for ONNX runtimes",
    "pt2": "a torch.export program",
}
"""By name, what a form is."""


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the form ``onnx``.

    Attributes:
        form: the model to convert; None takes ``sliced`` where anything is absent, and ``dense`` elsewhere.
        int8: evaluation images for static quantization to 8 bits; None leaves fp32.
    """

    form: Literal["dense", "sliced"] | None = None
    int8: int | None = None
