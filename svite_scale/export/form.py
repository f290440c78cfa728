"""The contract of a form: what its module gets and gives back, and ``export.json``, which lies in every exported folder.

A form is a module with the two functions of :class:`Form`. To add one: write the module, and name it in ``FORMS``
(:mod:`svite_scale.export.read`) and ``FORMATS`` (:mod:`svite_scale.export.formats`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, Protocol

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from svite_scale.config.earlier import missing_fields
from svite_scale.config.load import build, leaf_hints, leaves, to_dict
from svite_scale.errors import ConfigError, ExportError
from svite_scale.export.formats import OnnxOptions
from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig, PositiveList, TokensConfig
from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.options import in_section, options, options_of
from svite_scale.saved_run import SavedRun

DESCRIPTION = "export.json"
"""The file that every exported folder has."""

WEIGHTS = "model.safetensors"
"""The file of weights, in the forms that have one."""


@options
class Preprocessing:
    """What is done to an image before the model gets it."""

    mean: tuple[float, ...]
    """Per channel, for pixels in 0..1."""
    std: PositiveList
    image_size: Annotated[int, Field(ge=1)]
    """Pixels, height and width alike."""
    eval_crop: Annotated[float, Field(gt=0.0, le=1.0)]
    """The short side is resized to ``image_size / eval_crop``, rounded down, and the centre is cropped."""
    interpolation: Literal["bicubic"] = "bicubic"


@options
class Origin:
    """The checkpoint that a model comes from."""

    run: str
    """Name of the run directory."""
    checkpoint: str
    step: Annotated[int, Field(ge=0)]
    """The optimizer step after which it was saved."""
    ema: bool
    """True for the moving average of the weights."""


@options
class Description:
    """The content of ``export.json``."""

    form: str
    model: ModelConfig
    """The dense model."""
    tokens: TokensConfig
    """The token selectors in it; ``keep`` is null where there are none."""
    preprocessing: Preprocessing
    origin: Origin
    license: str | None
    versions: dict[str, str]
    """Of the libraries that wrote the export."""


@dataclass(frozen=True)
class Export:
    """An export to write.

    Attributes:
        run: that is exported.
        model: its sparse model, on the CPU, in fp32 and evaluation mode. Forms don't change it.
        description: of the export.
        onnx: options of the form ``onnx``.
    """

    run: SavedRun
    model: nn.Module
    description: Description
    onnx: OnnxOptions = field(default_factory=OnnxOptions)

    @property
    def example(self) -> Tensor:
        """Two images of noise, fp32 ``[2, C, H, W]``, always the same, for tracing and for checking outputs."""
        model = self.description.model
        shape = (2, model.in_channels, model.image_size, model.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Notes:
    """What a form says of itself on the model card.

    Attributes:
        usage: Markdown: how to load the model in a few lines.
        facts: values by name, for a table; for example an accuracy that was measured in this form.
        limits: sentences.
        library: the library that loads the form, as model hubs name it.
    """

    usage: str
    facts: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    library: str = "pytorch"


class Form(Protocol):
    """The functions of a form's module."""

    def write(self, export: Export, folder: Path) -> Notes:
        """Writes the model's files into an empty folder. ``export.json`` and ``README.md`` aren't among them.

        Raises:
            ExportError: the model has no such form; the message names those that it has.
        """
        ...

    def read(self, folder: Path, description: Description) -> nn.Module:
        """Returns the model, on the CPU and in evaluation mode: fp32 ``[B, C, H, W]``, normalised, to logits ``[B, classes]``.

        The folder may be somebody else's. Nothing in it is unpickled or run.

        Raises:
            ExportError: a file is missing, damaged, or of another model.
        """
        ...


def describe(run: SavedRun, form: str, *, ema: bool = False, license: str | None = None) -> Description:
    """Returns the description of an export of a run."""
    config, data = run.config, run.config.data
    model = replace(config.model, weights=None, drop_path=0.0, activation_checkpointing=False)
    return Description(
        form=form,
        model=model,
        tokens=config.sparsity.tokens if config.sparsity.tokens.keep is not None else TokensConfig(),
        preprocessing=Preprocessing(mean=data.mean, std=data.std, image_size=model.image_size, eval_crop=data.eval_crop),
        origin=Origin(run=run.run_dir.resolve().name, checkpoint=run.checkpoint.name, step=run.step, ema=ema),
        license=license,
        versions={name: metadata.version(name) for name in ("svite_scale", "torch", "timm")},
    )


def write_description(description: Description, folder: Path) -> None:
    """Writes ``export.json``."""
    (folder / DESCRIPTION).write_text(json.dumps(to_dict(description), indent=2) + "\n", encoding="utf-8")


def read_description(folder: Path) -> Description:
    """Reads ``export.json``.

    Raises:
        ExportError: there is none, or it is damaged.
    """
    path = folder / DESCRIPTION
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no JSON object")
        values = dict(leaves(raw, leaf_hints(Description)))
        # Of an export of an earlier version.
        tokens = {f"sparsity.{name}": value for name, value in values.items() if name.startswith("tokens.")}
        values |= {name.removeprefix("sparsity."): value for name, value in missing_fields(tokens).items()}
        description = build(Description, values)
        if description.model.weights is not None:
            raise ValueError("its model names a file of weights, and the weights of an export are in its folder")
        given, taken = description.preprocessing.image_size, description.model.image_size
        if given != taken:
            raise ValueError(f"its preprocessing gives images of {given} pixels, and its model takes {taken}")
        return description
    except FileNotFoundError as error:
        raise ExportError(f"{folder} holds no export: it has no {DESCRIPTION}; name a folder of launch/export.py") from error
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise ExportError(f"{path} can't be used ({error}); export the model again") from error


def empty_model(description: Description) -> nn.Module:
    """Returns the dense model, with its token selectors, for weights to be loaded into; on the CPU, in evaluation mode.

    Raises:
        ConfigError: timm can't build it.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_dense(description.model)
        if description.tokens.keep is not None:
            with in_section("tokens"):
                insert_token_selectors(model, **options_of(TokensConfig, description.tokens))
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file.

    Raises:
        ExportError: it can't be read.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ExportError(f"{path} can't be read ({error}); export the model again") from error


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads a state dict into a model.

    Args:
        model: to load into.
        tensors: the state dict.
        path: where they come from, for the message.

    Raises:
        ExportError: the tensors aren't those of the model; names one.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if wrong:
        of_file, of_model = (shapes.get(wrong[0], "absent") for shapes in (found, wanted))
        raise ExportError(
            f"{path} isn't of the model in {DESCRIPTION}: {len(wrong)} tensors differ, first {wrong[0]}, {of_file} in the "
            f"file and {of_model} in the model; export the model again"
        )
    model.load_state_dict(dict(tensors))
