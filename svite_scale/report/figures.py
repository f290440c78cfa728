"""What is drawn: each function takes arrays and returns the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from svite_scale.report.densities import Curve, LayerDensity
from svite_scale.report.unit_history import UnitHistory

COLORS = {"weights": "#4878a8", "heads": "#c8553d", "neurons": "#588157"}
ABSENT = "#e8e8e8"
DIMMED = 0.3
"""What is left of a dropped patch's pixels."""

DARK_BLUE = np.array([0.15, 0.25, 0.5], dtype=np.float32)
"""What they fade to: no grey, so that a dropped patch of a black and white image shows too."""

DPI = 100
IMAGES_PER_ROW = 8
LAYERS_PER_ROW = 3
MAX_TICKS = 6


def dimmed(pixels: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_], grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Images whose dropped patches fade to dark blue.

    Args:
        pixels: ``[B, C, H, W]``, C being 1 or 3.
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
    """Images ``[B, H, W, 3]``, each under its title."""
    columns = min(len(images), IMAGES_PER_ROW)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.8 * columns, 2.1 * rows), layout="constrained")
    for axes, image, title in zip(_grid(figure, rows, columns, len(images)), images, titles, strict=True):
        axes.imshow(image, interpolation="nearest", vmin=0, vmax=1)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    return _png(figure)


def draw_units(histories: Sequence[UnitHistory], steps: Sequence[int]) -> bytes:
    """Which units of each layer were active after each update; ``steps`` are those of the columns."""
    columns = min(len(histories), LAYERS_PER_ROW)
    rows = -(-len(histories) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    for axes, history in zip(_grid(figure, rows, columns, len(histories)), histories, strict=True):
        colors = ListedColormap([ABSENT, COLORS[history.unit]])
        axes.imshow(history.active, aspect="auto", cmap=colors, vmin=0, vmax=1, origin="lower")
        axes.set_title(history.layer, fontsize=9)
        axes.set_ylabel(history.unit.removesuffix("s"))
        axes.set_xlabel("update after optimizer step")
        shown = _spread(len(steps), MAX_TICKS)
        axes.set_xticks(shown, [f"{steps[column]:,}" for column in shown], fontsize=8)
        axes.set_yticks(_spread(len(history.active), MAX_TICKS))
    return _png(figure)


def draw_densities(densities: Sequence[LayerDensity]) -> bytes:
    """A bar per layer, coloured by what is counted."""
    figure = Figure(figsize=(8.0, 1.2 + 0.22 * len(densities)), layout="constrained")
    axes = figure.subplots()
    for unit in dict.fromkeys(entry.unit for entry in densities):
        own = [(row, entry.density) for row, entry in enumerate(densities) if entry.unit == unit]
        bars = axes.barh(*zip(*own, strict=True), color=COLORS[unit], label=unit)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    axes.set_yticks(range(len(densities)), [entry.layer for entry in densities], fontsize=8)
    axes.set_ylim(len(densities) - 0.4, -0.6)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("share that is active")
    figure.legend(loc="outside upper center", ncols=len(COLORS), fontsize=8, frameon=False)
    return _png(figure)


def draw_curves(curves: Sequence[Curve]) -> bytes:
    """Shares over optimizer steps."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.steps, curve.values, label=curve.name, marker="." if len(curve.steps) < 50 else None)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("share")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _png(figure)


def _grid(figure: Figure, rows: int, columns: int, count: int) -> list[Axes]:
    """The first ``count`` places of a grid; the others stay empty."""
    return [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def _spread(count: int, most: int) -> list[int]:
    """Up to ``most`` of 0 to ``count - 1``, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most)).tolist()})


def _png(figure: Figure) -> bytes:
    # A canvas of its own: neither a display nor pyplot's global state is touched.
    content = BytesIO()
    FigureCanvasAgg(figure).print_figure(content, format="png", dpi=DPI)
    return content.getvalue()
