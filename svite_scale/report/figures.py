"""The pictures of a run: the numbers that each one shows, and how it is drawn as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.models.token_selector import TokenSelector
from svite_scale.saved_run import Line, damaged_line
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.units import UnitLayer
from svite_scale.tracking.tracker import METRICS

CURVES = ("ever_active", "heads/ever_active", "neurons/ever_active", "drop_fraction")
"""Metrics that are shown over time."""

OLD_NAMES = {"drop_rate": "drop_fraction"}
"""Metrics of older runs, by the name that they have now."""

COLORS = {"weights": "#4878a8", "heads": "#c8553d", "neurons": "#588157"}
ABSENT = "#e8e8e8"
DIMMED = 0.3
"""Weight of the pixels of a dropped patch, against :data:`DARK_BLUE`."""

DARK_BLUE = np.array([0.15, 0.25, 0.5], dtype=np.float32)
"""Color that dropped patches fade to. It isn't grey, so they stand out in a black and white image too."""

DPI = 100
IMAGES_PER_ROW = 8
LAYERS_PER_ROW = 3
MAX_TICKS = 6


def named_selectors(model: nn.Module) -> list[tuple[str, TokenSelector]]:
    """Returns the token selectors in order, with their names among the blocks: ``selector<i>`` stands before block i."""
    return [(name.rpartition(".")[2], item) for name, item in model.named_modules() if isinstance(item, TokenSelector)]


def kept_patches(model: VisionTransformer, images: Tensor) -> Tensor:
    """Returns which patches of each image are left after each selector.

    Args:
        model: in evaluation mode, not wrapped by any engine.
        images: inputs of the model, ``[B, C, H, W]``.

    Returns:
        Bool ``[selectors, B, patches]``, patches in rows from the top left.
    """
    inputs: list[Tensor] = []
    selectors = [selector for _, selector in named_selectors(model)]
    hooks = [selector.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for selector in selectors]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    passed = [tokens_passed(selector, x)[:, model.num_prefix_tokens :] for selector, x in zip(selectors, inputs, strict=True)]
    return compose(passed, model.patch_embed.num_patches)


@torch.enable_grad()
def tokens_passed(selector: TokenSelector, x: Tensor) -> Tensor:
    """Returns which of the tokens ``x``, ``[B, N, D]``, pass a selector in evaluation mode; bool ``[B, N]``.

    The output holds these tokens unchanged; the others are left out or set to 0. So exactly these have a gradient.
    """
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(selector(x).sum(), x)
    return gradient.ne(0).any(dim=-1)


def compose(passed: Sequence[Tensor], num_patches: int) -> Tensor:
    """Maps the patch tokens that pass each selector to patches of the image.

    Args:
        passed: by selector, bool ``[B, N]``: which of the N patch tokens that reach it pass. N is smaller behind a selector
            that leaves tokens out.
        num_patches: of an image.

    Returns:
        Bool ``[selectors, B, num_patches]``.
    """
    kept: list[Tensor] = []
    for passing in passed:
        reaching = torch.ones(len(passing), num_patches, dtype=torch.bool)
        if passing.shape[1] < num_patches:
            reaching = kept[-1]
        # In row-major order, so each image's tokens go, in order, to those of its patches that reached the selector.
        kept.append(torch.zeros_like(reaching).masked_scatter_(reaching, passing))
    return torch.stack(kept) if kept else torch.zeros(0, 0, num_patches, dtype=torch.bool)


def dimmed(pixels: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_], grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Returns images whose dropped patches fade to dark blue.

    Args:
        pixels: ``[B, C, H, W]``, with C = 1 or 3.
        kept: ``[B, patches]``, in rows from the top left.
        grid: rows and columns of patches.

    Returns:
        RGB of 0 to 1, ``[B, H, W, 3]``.
    """
    batch, _, height, width = pixels.shape
    rows, columns = grid
    colors = np.broadcast_to(pixels.transpose(0, 2, 3, 1).astype(np.float32) / 255, (batch, height, width, 3))
    passes = kept.reshape(batch, rows, columns).repeat(height // rows, axis=1).repeat(width // columns, axis=2)
    return np.where(passes[..., None], colors, DIMMED * colors + (1 - DIMMED) * DARK_BLUE)


def draw_patches(images: npt.NDArray[np.float32], titles: Sequence[str]) -> bytes:
    """Returns a PNG of images ``[B, H, W, 3]``, each under its title."""
    figure, places = _grid(len(images), IMAGES_PER_ROW, width=1.8, height=2.1)
    for axes, image, title in zip(places, images, titles, strict=True):
        axes.imshow(image, interpolation="nearest", vmin=0, vmax=1)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    return _png(figure)


@dataclass(frozen=True)
class UnitHistory:
    """The active units of one layer, at the start and after each update.

    Attributes:
        layer: its name.
        unit: ``heads`` or ``neurons``.
        active: bool ``[N, updates + 1]``. The first column is the start.
    """

    layer: str
    unit: str
    active: npt.NDArray[np.bool_]


def unit_histories(model: nn.Module, lines: Sequence[Line], path: Path) -> list[UnitHistory]:
    """Returns the history of each layer of heads or neurons, in the model's order; empty without lines.

    Args:
        model: not wrapped by any engine.
        lines: of ``topology.jsonl``.
        path: of that file, for errors.

    Raises:
        RunError: a line has no mask of a layer, or one that isn't of its size.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, UnitLayer)}
    if not lines:
        return []
    return [
        UnitHistory(name, layer.unit, np.stack([_active(line, name, layer.shape.numel(), path) for line in lines], axis=1))
        for name, layer in layers.items()
    ]


def _active(line: Line, layer: str, num_units: int, path: Path) -> npt.NDArray[np.bool_]:
    """Returns a layer's mask in a line, bool ``[num_units]``."""
    try:
        masks: Mapping[str, str] = line["masks"]
        mask = torch.frombuffer(bytearray.fromhex(masks[layer]), dtype=torch.uint8)
        return bits.unpack(mask, num_units).numpy()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged_line(path, f"the line of step {line['step']}, layer {layer},", error) from error


def draw_units(histories: Sequence[UnitHistory], steps: Sequence[int]) -> bytes:
    """Returns a PNG of the units of each layer that were active at each of ``steps``, the columns."""
    figure, places = _grid(len(histories), LAYERS_PER_ROW, width=4.2, height=2.6)
    for axes, history in zip(places, histories, strict=True):
        colors = ListedColormap([ABSENT, COLORS[history.unit]])
        axes.imshow(history.active, aspect="auto", cmap=colors, vmin=0, vmax=1, origin="lower")
        axes.set_title(history.layer, fontsize=9)
        axes.set_ylabel(history.unit.removesuffix("s"))
        axes.set_xlabel("update after optimizer step")
        shown = _spread(len(steps), MAX_TICKS)
        axes.set_xticks(shown, [f"{steps[column]:,}" for column in shown], fontsize=8)
        axes.set_yticks(_spread(len(history.active), MAX_TICKS))
    return _png(figure)


class LayerDensity(NamedTuple):
    """The active fraction of a layer's units, which are weights, heads or neurons."""

    layer: str
    unit: str
    density: float


@torch.no_grad()
def layer_densities(model: nn.Module) -> list[LayerDensity]:
    """Returns the density of each sparse layer, counted in its mask, in the model's order. No engine wraps the model."""
    densities = []
    for name, layer in sparse_layers(model).items():
        active = bits.unpack(layer.mask, layer.shape.numel())
        densities.append(LayerDensity(name, layer.unit, int(active.count_nonzero()) / active.numel()))
    return densities


def draw_densities(densities: Sequence[LayerDensity]) -> bytes:
    """Returns a PNG of one bar per layer, coloured by unit."""
    figure = Figure(figsize=(8.0, 1.2 + 0.22 * len(densities)), layout="constrained")
    axes = figure.subplots()
    for unit in dict.fromkeys(entry.unit for entry in densities):
        own = [(row, entry.density) for row, entry in enumerate(densities) if entry.unit == unit]
        bars = axes.barh(*zip(*own, strict=True), color=COLORS[unit], label=unit)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    axes.set_yticks(range(len(densities)), [entry.layer for entry in densities], fontsize=8)
    axes.set_ylim(len(densities) - 0.4, -0.6)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("active fraction")
    figure.legend(loc="outside upper center", ncols=len(COLORS), fontsize=8, frameon=False)
    return _png(figure)


class Curve(NamedTuple):
    """One metric by optimizer step."""

    name: str
    steps: list[int]
    values: list[float]


def curves(metrics: Sequence[Line]) -> list[Curve]:
    """Returns those of :data:`CURVES` that lines of ``metrics.jsonl`` have.

    Raises:
        RunError: a value isn't a number.
    """
    found = []
    metrics = [{OLD_NAMES.get(name, name): value for name, value in line.items()} for line in metrics]
    for name in CURVES:
        having = [line for line in metrics if name in line]
        if having:
            found.append(Curve(name, [line["step"] for line in having], [_number(line, name) for line in having]))
    return found


def _number(line: Line, name: str) -> float:
    value = line[name]
    if type(value) not in (int, float):
        raise damaged_line(Path(METRICS), f"{name} of step {line['step']}", TypeError(f"{str(value)[:40]!r} is no number"))
    return float(value)


def draw_curves(curves: Sequence[Curve]) -> bytes:
    """Returns a PNG of curves over optimizer steps."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.steps, curve.values, label=curve.name, marker="." if len(curve.steps) < 50 else None)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("fraction")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _png(figure)


def _grid(count: int, per_row: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a place for each of ``count`` pictures, ``width`` x ``height`` inches."""
    columns = min(count, per_row)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def _spread(count: int, most: int) -> list[int]:
    """Returns up to ``most`` numbers from 0 to ``count - 1``, spread evenly, with the first and the last."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most)).tolist()})


def _png(figure: Figure) -> bytes:
    # With a canvas of its own it needs no display, and leaves pyplot's global state alone.
    content = BytesIO()
    FigureCanvasAgg(figure).print_figure(content, format="png", dpi=DPI)
    return content.getvalue()
