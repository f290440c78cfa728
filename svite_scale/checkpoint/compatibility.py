"""What a resumed run must share with the saved run."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from svite_scale.checkpoint.load import saved_sizes
from svite_scale.config.earlier import complete
from svite_scale.config.load import flatten_config, to_dict
from svite_scale.config.schema import Config
from svite_scale.errors import CheckpointError

FIXED_FIELDS = (
    "seed",
    "model.",
    "sparsity.",
    "distillation.",
    "optimizer.",
    "train.epochs",
    "train.global_batch_size",
    "train.ema_decay",
    "data.shuffle_shards",
    "data.last_batch",
    "data.mean",
    "data.std",
    "data.max_pixels",
    "data.augment.",
)
"""Config fields and sections (with a dot at the end) that define what is computed. A resumed run must not change them."""

FREE_FIELDS = ("model.activation_checkpointing", "model.weights", "model.init_gain", "sparsity.masks", "sparsity.init")
"""Fields of those sections that change no number: what is kept for backward, and where the first weights and masks come from. A
checkpoint replaces these."""

RENAMED_TENSORS = ("topology/recently_grown/", "topology/newcomers/")
"""Prefix of tensors' names, today and in older checkpoints."""

PACKAGES = ("svite_scale", "torch", "deepspeed", "timm")

logger = logging.getLogger("svite_scale")


def check_same_run(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Refuses to resume with another recipe than the checkpoint's.

    Raises:
        CheckpointError: names the field and both values.
    """
    then = complete(flatten_config(saved))
    for field, value in flatten_config(to_dict(config)).items():
        if field.startswith(FIXED_FIELDS) and field not in FREE_FIELDS and then[field] != value:
            raise CheckpointError(
                f"{path} was saved with {field} = {then[field]!r}, not {value!r}; restore it, or start a new run"
            )


def check_same_samples(saved: Mapping[str, object] | None, now: Mapping[str, object] | None, path: Path) -> None:
    """Refuses to resume on other training samples, because their order would differ.

    Raises:
        CheckpointError: names both.
    """
    if saved != now:
        raise CheckpointError(
            f"{path} was saved by a run on other training shards ({saved} there, {now} in data.train now); restore them, with "
            "their order, or start a new run"
        )


def names_on_disk(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the same tensors by their names in the checkpoint. An older checkpoint has other names for some.

    Raises:
        CheckpointError: the checkpoint's metadata can't be read.
    """
    saved = saved_sizes(path)
    found = {}
    for name, tensor in state.items():
        older = name.replace(*RENAMED_TENSORS)
        found[older if older in saved else name] = tensor
    return found


def check_same_tensors(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuses a checkpoint whose tensors have other names or sizes than this run's.

    Args:
        path: of the checkpoint.
        state: this run's tensors.
        prefix: of the names to compare; the checkpoint may hold other tensors besides.

    Raises:
        CheckpointError: a tensor differs, or the checkpoint's metadata can't be read.
    """
    saved = saved_sizes(path)
    remedy = "use the config that it was saved with"
    for name in sorted(name for name in saved.keys() | state.keys() if name.startswith(prefix)):
        if name not in saved or name not in state:
            where = "checkpoint" if name in saved else "model"
            raise CheckpointError(f"{path}: {name} is only in the {where}; {remedy}")
        if saved[name] != state[name].shape:
            sizes = f"{saved[name].numel()} elements, the model's {state[name].numel()}"
            raise CheckpointError(f"{path}: {name} has {sizes}; {remedy}")


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that compute; None for one that isn't installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def warn_of_other_versions(saved: Mapping[str, str | None], path: Path) -> None:
    """Warns in one line if other versions saved a checkpoint: results may then differ in the last bits."""
    changed = [f"{name} {saved.get(name)} (now {now})" for name, now in versions().items() if saved.get(name) != now]
    if changed:
        logger.warning("checkpoint %s was saved by %s", path, ", ".join(changed))
