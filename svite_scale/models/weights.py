"""Weights that a model starts from: read from a file or an exported folder, and fitted to a dense timm model."""

from __future__ import annotations

import argparse
import json
import logging
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from svite_scale.errors import OptionError
from svite_scale.models import sliced_model
from svite_scale.models.token_selector import TokenSelector
from svite_scale.sparsity.bitmask_layout import BitmaskMatrix, decode
from svite_scale.sparsity.layers.base import SparseLayer

REMEDY = "give a timm model's state_dict() as .safetensors or .pth, or what launch/export.py writes as timm, sliced or packed"
POSITIONS = "pos_embed"
STATE_KEYS = ("state_dict", "model")
"""Keys of a ``.pth`` under which a state dict may be. The first that has one is taken."""

BITMASK = ".bitmask"
"""End of a tensor's name that only the form packed has."""

MOST_NAMES = 4
"""Tensors of a kind that an error names."""

logger = logging.getLogger("svite_scale")


@dataclass(frozen=True)
class Weights:
    """Tensors by the names of a dense timm model. They are read one at a time, except those of a sliced export.

    Attributes:
        field: the option that names the file, for errors.
        path: of the file or the folder.
        shapes: of the tensors.
        read: returns a tensor, on the CPU.
        read_mask: returns which elements of a weight are active, bool like the weight.
        matrices: weights that are stored as matrices, ``[out, all other dimensions]``, whatever their shape in the model.
        choices: what was taken of a file that holds several state dicts, in words, one line each.
    """

    field: str
    path: str
    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]
    read_mask: Callable[[str], Tensor]
    matrices: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()

    def error(self, problem: str, remedy: str = REMEDY) -> OptionError:
        """Returns the error about something in the file."""
        return OptionError(self.field, self.path, problem, remedy)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads weights into a dense timm model, in place, before it is made sparse and before an engine wraps it. Local.

    Position embeddings of another image size are interpolated. The first convolution is adapted to another number of channels.
    A head of another number of classes stays as it is. Each of these is logged in one line.

    Args:
        model: of timm; ``insert_token_selectors`` may have been called on it.
        path: a ``.safetensors`` or ``.pth`` file of a timm model's state dict, or an exported folder, or the file of weights in
            one, of the form timm, sliced or packed. Nothing in it is run.

    Raises:
        OptionError: the file can't be read, or isn't of this model; names the tensors.
    """
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise OptionError("weights", str(path), "can't be loaded into a sparse model", "load them before sparsify")
    fitted = fit(model, open_weights(str(path)))
    fitted.log_changes()
    fitted.load(model)


def open_weights(path: str, field: str = "weights") -> Weights:
    """Opens a file of weights, or an exported folder; reads nothing but names and shapes, except of a sliced export.

    Args:
        path: of the file or the folder.
        field: the option that names it, for errors.

    Raises:
        OptionError: it can't be read, or holds no weights.
    """
    file = Path(path)
    if file.is_dir():
        file /= sliced_model.WEIGHTS
        if not file.is_file():
            raise OptionError(field, path, f"is a folder without {file.name}", REMEDY)
    if not file.is_file():
        raise OptionError(field, path, "is no file", f"check the path; {REMEDY}")
    try:
        if _is_sliced(file):
            return _of_tensors(field, path, sliced_model.dense_state_dict(file.parent))
        if file.suffix == ".safetensors":
            return _of_safetensors(field, path, file)
        tensors, choices = _read_pth(file)
        return replace(_of_tensors(field, path, tensors), choices=choices)
    except Exception as error:  # the readers of damaged files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(field, path, f"can't be read as a state dict ({reason})", REMEDY) from error


def _is_sliced(file: Path) -> bool:
    """Returns whether a file of weights is that of a sliced export."""
    with suppress(OSError, ValueError, RecursionError):
        description = json.loads((file.parent / sliced_model.DESCRIPTION).read_text())
        is_ours = isinstance(description, dict) and description.get("format") == sliced_model.FORMAT
        return is_ours and file.name == sliced_model.WEIGHTS
    return False


def _read_pth(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the state dict of a ``.pth``, alone or under one of :data:`STATE_KEYS`, and the choice if there are several. Its
    tensors are read when they are used, unless the file is of torch's old format.

    Raises:
        ValueError: there is no state dict at these places; names the file's keys.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints have one
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except UnpicklingError as error:  # torch's own text advises to run what is in the file
            raise ValueError("it is no file of torch.save, or holds more than tensors") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if _is_state_dict(content):
        return clean_state_dict(content), ()
    keys = [str(key) for key, value in content.items() if _is_state_dict(value)]
    taken = next((key for key in STATE_KEYS if key in keys), None)
    if taken is None:
        remedy = f"; save what is under {keys[0]!r} alone, by torch.save" if keys else ""
        names = _listed([repr(key) for key in content])
        raise ValueError(
            f"it is no dict of tensors, and has none under {' or '.join(STATE_KEYS)}; its keys are {names}{remedy}"
        )
    others = [repr(key) for key in keys if key != taken]
    choice = f"the weights under {taken!r} are taken, not those under {_listed(others)}"
    return clean_state_dict(content[taken]), (choice,) if others else ()


def _is_state_dict(content: object) -> bool:
    return isinstance(content, dict) and len(content) > 0 and all(isinstance(value, Tensor) for value in content.values())


def _of_tensors(field: str, path: str, tensors: Mapping[str, Tensor]) -> Weights:
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device, without values" if tensor.is_meta else f"of the layout {tensor.layout}"
            raise ValueError(f"its tensor {name} is {kind}; save ordinary dense tensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Weights(field, path, shapes, tensors.__getitem__, lambda name: tensors[name] != 0)


def _of_safetensors(field: str, path: str, file: Path) -> Weights:
    with safe_open(file, "pt") as stored:
        stored_names: dict[str, str] = clean_state_dict({name: name for name in stored.keys()})  # noqa: SIM118 - no mapping
        shapes = {name: torch.Size(stored.get_slice(inner).get_shape()) for name, inner in stored_names.items()}

    def read(name: str) -> Tensor:
        with safe_open(file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(stored_names.get(name, name))
        return tensor

    if not any(name.endswith(BITMASK) for name in shapes):
        return Weights(field, path, shapes, read, lambda name: read(name) != 0)
    return _of_packed(field, path, shapes, read)


def _of_packed(field: str, path: str, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor]) -> Weights:
    """Returns the weights of a file in the layout of :mod:`~svite_scale.sparsity.bitmask_layout`.

    Args:
        field: the option that names the file.
        path: of the file or the folder.
        shapes: of the tensors in the file.
        read: returns one of them.
    """
    packed = {f"{name.removesuffix(BITMASK)}.weight" for name in shapes if name.endswith(BITMASK)}
    parts = {name: [f"{name.removesuffix('weight')}{end}" for end in BitmaskMatrix._fields] for name in packed}
    in_parts = {part for names in parts.values() for part in names}
    dense = {name: shape for name, shape in shapes.items() if name not in in_parts}
    dense |= {name: torch.Size(read(f"{name.removesuffix('weight')}shape").tolist()) for name in packed}

    def decoded(name: str) -> tuple[Tensor, Tensor]:
        try:
            return decode(BitmaskMatrix(*map(read, parts[name])))
        except (SafetensorError, ValueError) as error:
            raise OptionError(field, path, f"its tensor {name} is damaged ({error})", "export the model again") from error

    def read_dense(name: str) -> Tensor:
        return decoded(name)[0] if name in packed else read(name)

    def read_mask(name: str) -> Tensor:
        return decoded(name)[1] if name in packed else read(name) != 0

    return Weights(field, path, dense, read_dense, read_mask, matrices=frozenset(packed))


@dataclass
class FittedWeights:
    """Weights, and what becomes of each so that it fits a model.

    Attributes:
        weights: of the file.
        kept: tensors of the model that stay as they were drawn, by name.
        shapes: of tensors in the file as the model has them, before they are changed, where they are stored as matrices.
        changed: functions that make a tensor of the file fit, by name.
        changes: all that in words, one line each; first the choices in the file.
    """

    weights: Weights
    kept: set[str] = field(default_factory=set)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    changed: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)

    def log_changes(self) -> None:
        """Logs the changes, one line each."""
        for change in self.changes:
            logger.warning("%s: %s", self.weights.path, change)

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copies the weights into the model that they were fitted to, one tensor at a time.

        Raises:
            OptionError: a tensor holds no numbers of the kind that the model's does, or a weight isn't finite.
        """
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in self.kept:
                found = self.read(name)
                if found.is_floating_point() != tensor.is_floating_point():
                    raise self.weights.error(f"its tensor {name} is of {found.dtype}, the model's of {tensor.dtype}")
                if isinstance(tensor, nn.Parameter) and not found.isfinite().all():
                    raise self.weights.error(f"its tensor {name} has values that aren't finite", "use an earlier checkpoint")
                tensor.copy_(found)

    def read(self, name: str) -> Tensor:
        """Returns a tensor as the model gets it."""
        tensor = self.weights.read(name)
        tensor = tensor.view(self.shapes.get(name, tensor.shape))
        return self.changed[name](tensor) if name in self.changed else tensor

    def active(self, layer: str, shape: torch.Size) -> Tensor:
        """Returns which weights of a layer are active, bool ``[N]``: those that aren't 0, and all of a new head."""
        name = f"{layer}.weight"
        if name in self.kept:
            return torch.ones(shape.numel(), dtype=torch.bool, device="cpu")
        return (self.read(name) != 0 if name in self.changed else self.weights.read_mask(name)).flatten()


def fit(model: nn.Module, weights: Weights, *, exactly: bool = False) -> FittedWeights:
    """Returns weights fitted to a dense timm model, by names and shapes alone.

    Args:
        model: on any device, meta too; token selectors may be in it.
        weights: of the same architecture.
        exactly: change nothing, so that position embeddings, first convolution and head must fit as they are.

    Raises:
        OptionError: the weights are of another model; names the tensors.
    """
    wanted: dict[str, torch.Size] = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found, fitted = dict(weights.shapes), FittedWeights(weights, changes=list(weights.choices))
    _unflatten(wanted, found, fitted)
    if not exactly:
        _keep_selectors(model, found, fitted)
        _keep_head(model, wanted, found, fitted)
        _adapt_channels(model, wanted, found, fitted)
        _interpolate_positions(model, wanted, found, fitted)
    missing = [name for name in wanted if name not in found and name not in fitted.kept]
    unknown = [name for name in found if name not in wanted]
    other = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and name not in fitted.kept and found[name] != shape
    ]
    problems = {"it has no": missing, "the model has no": unknown, "of other shapes": other}
    if any(problems.values()):
        text = "; ".join(f"{problem} {_listed(names)}" for problem, names in problems.items() if names)
        remedy = "use the model that it was saved from, with its sizes"
        if unknown and all(name.startswith("blocks.selector") for name in unknown):
            remedy += ", and the token selectors that it was trained with (sparsity.tokens)"
        raise weights.error(f"isn't of this {_name_of(model)}: {text}", remedy)
    return fitted


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _name_of(model: nn.Module) -> str:
    name: str = _known(model).get("architecture") or type(model).__name__
    return name


def _known(model: nn.Module) -> Mapping[str, Any]:
    """Returns what timm knows of a model."""
    known = getattr(model, "pretrained_cfg", None)
    return known if isinstance(known, Mapping) else {}


def _names(model: nn.Module, part: str, tensors: Iterable[str]) -> list[str]:
    """Returns those tensors that are in a part of the model, ``classifier`` or ``first_conv``, which may be several modules."""
    modules = _known(model).get(part) or ()
    places = (modules,) if isinstance(modules, str) else modules
    return [name for name in tensors if any(name.startswith(f"{place}.") for place in places)]


Shapes = dict[str, torch.Size]


def _unflatten(wanted: Shapes, found: Shapes, fitted: FittedWeights) -> None:
    """Gives convolutions that are stored as matrices their kernels' shape again."""
    for name in fitted.weights.matrices & wanted.keys():
        kernel, matrix = wanted[name][2:], found[name]
        if len(matrix) == 2 and matrix[1] % kernel.numel() == 0:
            found[name] = fitted.shapes[name] = torch.Size([matrix[0], matrix[1] // kernel.numel(), *kernel])


def _keep_selectors(model: nn.Module, found: Shapes, fitted: FittedWeights) -> None:
    """Keeps the weights of token selectors that the file doesn't have."""
    selectors = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, TokenSelector)
        for own, _ in module.named_parameters()
    }
    fitted.kept.update(selectors - found.keys())


def _keep_head(model: nn.Module, wanted: Shapes, found: Shapes, fitted: FittedWeights) -> None:
    """Keeps the model's head if the file has none, or one of another number of classes."""
    own, theirs = _names(model, "classifier", wanted), _names(model, "classifier", found)
    other = next((name for name in own if name in found and found[name][:1] != wanted[name][:1]), None)
    if not own or (theirs and other is None):
        return
    fitted.kept.update(own)
    reason = "there is none in the file" if other is None else f"the file's has {found[other][0]}"
    fitted.changes.append(f"the head is new, for {wanted[own[0]][0]} classes; {reason}")


def _adapt_channels(model: nn.Module, wanted: Shapes, found: Shapes, fitted: FittedWeights) -> None:
    """Adapts the first convolution to another number of input channels, as timm does."""
    for name in _names(model, "first_conv", wanted.keys() & found.keys()):
        ours, theirs = wanted[name], found[name]
        if len(ours) == len(theirs) == 4 and ours[1] != theirs[1] and (ours[0], *ours[2:]) == (theirs[0], *theirs[2:]):
            fitted.changed[name] = partial(adapt_input_conv, ours[1], base_chans=theirs[1])
            fitted.changes.append(f"{name} is adapted from {theirs[1]} channels to {ours[1]}")
            found[name] = ours


def _interpolate_positions(model: nn.Module, wanted: Shapes, found: Shapes, fitted: FittedWeights) -> None:
    """Interpolates the position embeddings of another image size, as timm does."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    ours, theirs = wanted.get(POSITIONS, torch.Size()), found.get(POSITIONS, torch.Size())
    if grid is None or len(ours) != 3 or len(theirs) != 3 or ours[1] == theirs[1] or ours[2] != theirs[2]:
        return
    num_prefix = ours[1] - math.prod(grid)
    side = math.isqrt(max(0, theirs[1] - num_prefix))
    if num_prefix < 0 or side == 0 or side**2 != theirs[1] - num_prefix:
        return
    fitted.changed[POSITIONS] = partial(resample_abs_pos_embed, new_size=list(grid), num_prefix_tokens=num_prefix)
    fitted.changes.append(f"position embeddings are interpolated from {side} x {side} patches to {grid[0]} x {grid[1]}")
    found[POSITIONS] = ours
