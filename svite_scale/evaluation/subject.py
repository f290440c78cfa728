"""The model to evaluate, from a run or from exported weights, and the options to evaluate it with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from svite_scale.config.earlier import read_saved_config
from svite_scale.config.load import make_config, read_config, to_dict
from svite_scale.config.schema import Config
from svite_scale.errors import ConfigError
from svite_scale.export.form import DESCRIPTION
from svite_scale.export.read import read_export
from svite_scale.models.dense import build_dense
from svite_scale.models.weights import fit, open_weights
from svite_scale.options import in_section
from svite_scale.saved_run import load_model, read_run
from svite_scale.train.evaluate import Forward

ADJUSTABLE = ("data.", "train.eval_batch_size", "train.precision")
"""Starts of the config keys that an evaluation may replace; the others belong to the weights."""

ON_CPU = ("onnx", "pt2")
"""Exported forms that compute in fp32 on the CPU, as programs that torch.compile can't take."""

logger = logging.getLogger(__name__)

WEIGHTS_OUT = Path("evaluation")
"""Default folder of the results of exported weights."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        model: on the CPU, in fp32 and evaluation mode.
        form: ``sparse`` of a run, ``weights`` of a state dict, or that of the export.
        config: its data, image size, classes, batch size and precision.
        facts: what it is, for ``evaluation.json``.
        out: default folder of the results.
    """

    model: nn.Module
    form: str
    config: Config
    facts: dict[str, Any]
    out: Path


def subject_of_run(run_dir: Path, checkpoint: str | None, overrides: Sequence[str], *, ema: bool) -> Subject:
    """Returns the model of a run's checkpoint. Local.

    Args:
        run_dir: of the run.
        checkpoint: its name; None takes the newest valid one.
        overrides: ``dotted.key=value`` each, in place of values of the run's config.
        ema: take the moving average of the weights in place of the weights.

    Raises:
        ConfigError, RunError, CheckpointError: the run can't be read or used, or an override isn't allowed.
    """
    given = check_overrides(overrides)
    run = read_run(run_dir, checkpoint)
    config = read_saved_config(run_dir / "config.yaml", overrides)
    config = replace(run, config=config, val=config.data.val if "data.val" in given else None).evaluation_config()
    facts = {
        "run": str(run_dir),
        "checkpoint": run.checkpoint.name,
        "checkpoint_digest": run.digest,
        "step": run.step,
        "ema": ema,
    }
    return Subject(load_model(run, ema=ema), "sparse", config, facts, run.evaluation_folder(ema=ema))


def subject_of_export(path: Path, overrides: Sequence[str], *, trusted: bool) -> Subject:
    """Returns the model of an exported folder. Local.

    Args:
        path: of the folder, or of a file in it.
        overrides: ``dotted.key=value`` each, ``data.val`` among them.
        trusted: see :func:`~svite_scale.export.read.read_export`.

    Raises:
        ConfigError, ExportError: the folder can't be read or used, or an override isn't allowed.
    """
    given = check_overrides(overrides)
    if not ((path if path.is_dir() else path.parent) / DESCRIPTION).exists():
        problem = f"is no exported folder, nor a file in one: {DESCRIPTION} is missing"
        raise ConfigError(
            "--weights", str(path), problem, "for a state dict of a timm model give --model NAME or --config FILE"
        )
    exported = read_export(path, trusted=trusted)
    if exported.form in ON_CPU and "train.precision" in given:
        raise ConfigError("train.precision", given["train.precision"], f"can't be set for {exported.form}", "leave it out")
    images, origin = exported.preprocessing, to_dict(exported.description.origin)
    values = {
        "run_dir": origin["run"],
        "model": to_dict(exported.description.model),
        "data": {"mean": images.mean, "std": images.std, "eval_crop": images.eval_crop},
    }
    config = make_config(values, overrides, str(path))
    facts = {"weights": str(path), "form": exported.form, "model": exported.name, **origin}
    return Subject(exported.model, exported.form, config, facts, WEIGHTS_OUT)


def subject_of_state_dict(path: Path, model: str | None, config_path: Path | None, overrides: Sequence[str]) -> Subject:
    """Returns a dense timm model with the weights of a file. Local.

    Args:
        path: a state dict, ``.safetensors`` or ``.pth``; zeros in it are no matter.
        model: timm's name of the model, whose own sizes and normalisation are taken.
        config_path: a run's config, whose ``model`` and ``data`` are taken in its place.
        overrides: ``dotted.key=value`` each, ``data.val`` among them; those of ``model`` are allowed too.

    Raises:
        ConfigError: the model can't be built, or the file isn't of this model, or an override isn't allowed.
    """
    check_overrides(overrides, "model.")
    if config_path is not None:
        config = read_config(config_path, overrides)
    else:
        config = make_config({"run_dir": "evaluation", **defaults_of(str(model))}, overrides, str(path))
    dense = build_dense(config.model)
    with in_section(""):
        fitted = fit(dense, open_weights(str(path), "--weights"), exactly=True)
        fitted.log_changes()
        fitted.load(dense)
    facts = {"weights": str(path), "form": None, "model": config.model.name}
    return Subject(dense.eval(), "weights", config, facts, WEIGHTS_OUT)


def defaults_of(model: str) -> dict[str, dict[str, Any]]:
    """Returns the sections ``model`` and ``data`` of a config, as timm's model was trained."""
    known = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if known is None:
        return {"model": {"name": model}}
    if known.interpolation != "bicubic":
        logger.warning("%s was trained with %s interpolation; here images are resized by bicubic", model, known.interpolation)
    if known.crop_mode != "center":
        logger.warning("%s was trained with crop mode %s; here the centre is cropped", model, known.crop_mode)
    channels, image_size, _ = known.input_size
    return {
        "model": {"name": model, "num_classes": known.num_classes, "image_size": image_size, "in_channels": channels},
        "data": {"mean": known.mean, "std": known.std, "eval_crop": known.crop_pct},
    }


def check_overrides(overrides: Sequence[str], *others: str) -> dict[str, str]:
    """Returns the values of overrides by key; ``others`` are further starts of keys that are allowed.

    Raises:
        ConfigError: one is of a key that belongs to the weights.
    """
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    for key, value in given.items():
        if not key.startswith((*ADJUSTABLE, *others)):
            problem = "belongs to the trained weights, so an evaluation can't change it"
            raise ConfigError(key, value, problem, "give data.*, train.eval_batch_size or train.precision")
    return given


def place(model: nn.Module, config: Config, device: torch.device) -> Forward:
    """Moves a model to a device, and returns its forward, which computes in the precision of the config as its engine does."""
    model.to(device)
    if config.train.precision == "fp32":
        return model
    if config.parallel.backend in ("single", "ddp"):

        def autocast(images: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return model(images)

        return autocast
    # FSDP2 and ZeRO compute with parameters that are rounded to bf16.
    model.to(torch.bfloat16)
    return lambda images: model(images.to(torch.bfloat16))
