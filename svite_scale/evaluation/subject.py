"""The model to evaluate, from a run or from exported weights, and the options to evaluate it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svite_scale.config.load import make_config, read_config, to_dict
from svite_scale.config.schema import Config
from svite_scale.errors import ConfigError
from svite_scale.export.read import read_export
from svite_scale.saved_run import load_model, read_run
from svite_scale.train.evaluate import Forward

ADJUSTABLE = ("data.", "train.eval_batch_size", "train.precision")
"""Starts of the config keys that an evaluation may replace; the others belong to the weights."""

WEIGHTS_OUT = Path("evaluation")
"""Default folder of the results of exported weights."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        model: on the CPU, in fp32 and evaluation mode.
        config: its data, image size, classes, batch size and precision.
        facts: what it is, for ``evaluation.json``.
        out: default folder of the results.
    """

    model: nn.Module
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
    config = read_config(run_dir / "config.yaml", overrides)
    config = replace(run, config=config, val=config.data.val if "data.val" in given else None).evaluation_config()
    facts = {"run": str(run_dir), "checkpoint": run.checkpoint.name, "step": run.step, "ema": ema}
    out = run_dir / "evaluation" / (run.checkpoint.name + ("-ema" if ema else ""))
    return Subject(load_model(run, ema=ema), config, facts, out)


def subject_of_export(path: Path, overrides: Sequence[str]) -> Subject:
    """Returns the model of an exported folder. Local.

    Args:
        path: of the folder, or of a file in it.
        overrides: ``dotted.key=value`` each, ``data.val`` among them.

    Raises:
        ConfigError, ExportError: the folder can't be read or used, or an override isn't allowed.
    """
    check_overrides(overrides)
    exported = read_export(path)
    origin, images = exported.description.origin, exported.preprocessing
    values = {
        "run_dir": origin.run,
        "model": to_dict(exported.description.model),
        "data": {"mean": images.mean, "std": images.std, "eval_crop": images.eval_crop},
    }
    facts = {"weights": str(path), "form": exported.form, "model": exported.name, **to_dict(origin)}
    return Subject(exported.model, make_config(values, overrides, str(path)), facts, WEIGHTS_OUT)


def check_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the values of overrides by key.

    Raises:
        ConfigError: one is of a key that belongs to the weights.
    """
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    for key, value in given.items():
        if not key.startswith(ADJUSTABLE):
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
