"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MOST_NAMED = 40
"""Labels of the largest matrix with a name beside each row."""

MOST_NUMBERED = 20
"""Labels of the largest matrix with a number in each cell."""


def draw_confusion(counts: npt.NDArray[np.int64], names: Sequence[str] | None) -> bytes:
    """Draws a confusion matrix: the color of a cell is the fraction of its row's samples.

    Args:
        counts: ``[L, L]``, samples by label and guess.
        names: of the labels; None shows their numbers.

    Returns:
        A PNG.
    """
    num_labels = len(counts)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.35 * num_labels, 5.0, 12.0))
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xlabel("guess")
    axes.set_ylabel("label")
    if num_labels <= MOST_NAMED:
        shown = names or [str(label) for label in range(num_labels)]
        axes.set_xticks(range(num_labels), shown, rotation=90)
        axes.set_yticks(range(num_labels), shown)
    if num_labels <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if fractions[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="fraction of the label's samples", shrink=0.8)
    # With a canvas of its own it needs no display, and leaves pyplot's global state alone.
    content = BytesIO()
    FigureCanvasAgg(figure).print_figure(content, format="png", dpi=120)
    return content.getvalue()
