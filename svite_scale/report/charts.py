"""Line charts as SVG. The style sheet colours them, so they follow light and dark, and shows values under the pointer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from svite_scale.report.html import Html, join, tag
from svite_scale.report.numbers import plain

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 16, 26
"""Margins of the plot, where the numbers of its axes stand."""

MAX_POINTS = 240
"""A longer line is drawn by the means of as many stretches."""

MAX_READINGS = 48
"""Places along a chart where the pointer reads values."""

MAX_MARKED = 40
"""Lines of so few points show each point."""

Format = Callable[[float], str]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: of the legend.
        steps: optimizer steps, ascending; at least one.
        values: finite and neither extremely large nor small, one per step.
        color: number of its color in the style sheet.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: int = 0


@dataclass(frozen=True)
class Axis:
    """Maps numbers from ``low`` to ``high`` to a coordinate from ``start`` to ``end``.

    Attributes:
        ticks: the round numbers that are written at the axis.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    def place(self, values: npt.ArrayLike) -> Floats:
        """Returns the coordinates of numbers."""
        fraction = (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)


def line_chart(title: str, series: Sequence[Series], show: Format = plain, *, from_zero: bool = False) -> Html:
    """Returns a figure of lines over the optimizer step, with its title and legend.

    Args:
        title: of the figure.
        series: at least one.
        show: writes a value.
        from_zero: the vertical axis begins at 0. It does so anyway if the values come near.
    """
    drawn = [(line, *shortened(line.steps, line.values)) for line in series]
    x = _step_axis([steps for _, steps, _ in drawn])
    y = _value_axis(np.concatenate([values for *_, values in drawn]), from_zero)
    plot = tag(
        "svg",
        _grid(x, y, show),
        *(_line(line, x.place(steps), y.place(values)) for line, steps, values in drawn),
        *_readings(drawn, x, y, show),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )
    keys = [
        tag(
            "span",
            tag("i", class_=f"c{line.color}"),
            f"{line.label} ",
            tag("b", show(line.values[-1])),
        )
        for line in series
    ]
    return tag("figure", tag("figcaption", tag("h3", title), tag("div", *keys, class_="legend")), plot, class_="chart")


def shortened(steps: Sequence[int], values: Sequence[float], most: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """Returns a line as it is if it has up to ``most`` points; else the means of ``most`` stretches of it."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) <= most:
        return x, y
    stretches = np.array_split(np.arange(len(x)), most)
    return np.array([x[part].mean() for part in stretches]), np.array([y[part].mean() for part in stretches])


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``, up to ``most + 1``."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _step_axis(steps: Sequence[Floats]) -> Axis:
    low, high = 0.0, max(float(each[-1]) for each in steps)
    high = max(high, 1.0)
    return Axis(low, high, LEFT, WIDTH - RIGHT, [tick for tick in round_ticks(low, high) if tick == int(tick)])


def _value_axis(values: Floats, from_zero: bool) -> Axis:
    low, high = float(values.min()), float(values.max())
    if from_zero or 0 <= low < 0.5 * high:
        low = min(low, 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    elif high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = min(0.0, 2 * low), max(0.0, 2 * high)
    pad = 0.04 * (high - low)
    low, high = low if low == 0 else low - pad, high + pad
    return Axis(low, high, HEIGHT - BOTTOM, TOP, round_ticks(low, high))


def _grid(x: Axis, y: Axis, show: Format) -> Html:
    """Returns the lines behind a plot, and the numbers of its axes."""
    rows = [(f"{place:.1f}", show(tick)) for tick, place in zip(y.ticks, y.place(y.ticks).tolist(), strict=True)]
    columns = [(place, plain(tick)) for tick, place in zip(x.ticks, x.place(x.ticks).tolist(), strict=True)]
    return tag(
        "g",
        *(tag("path", d=f"M{LEFT} {place}H{WIDTH - RIGHT}") for place, _ in rows),
        *(tag("text", text, x=LEFT - 6, y=place, dy="0.32em", text_anchor="end") for place, text in rows),
        *(
            tag("text", text, x=f"{place:.1f}", y=HEIGHT - 8, text_anchor="end" if place > WIDTH - 30 else "middle")
            for place, text in columns
        ),
        class_="grid",
    )


def _line(line: Series, x: Floats, y: Floats) -> Html:
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in zip(x, y, strict=True))
    marks = [_dot(left, top) for left, top in zip(x, y, strict=True)] if len(x) <= MAX_MARKED else []
    return tag("g", tag("path", d=path), *marks, class_=f"line c{line.color}")


def _dot(x: float, y: float, radius: float = 1.8) -> Html:
    return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius)


def _readings(drawn: Sequence[tuple[Series, Floats, Floats]], x: Axis, y: Axis, show: Format) -> list[Html]:
    """Returns the strips of a plot that show, under the pointer, the step and the values of all lines there."""
    all_steps = np.unique(np.concatenate([steps for _, steps, _ in drawn]))
    steps, _ = shortened(all_steps.tolist(), all_steps.tolist(), MAX_READINGS)
    places = x.place(steps).tolist()
    edges = [LEFT, *((left + right) / 2 for left, right in pairwise(places)), WIDTH - RIGHT]
    readings = []
    for step, place, (left, right) in zip(steps.tolist(), places, pairwise(edges), strict=True):
        words, dots = [tag("tspan", f"step {plain(round(step))}")], []
        for line, at, values in drawn:
            nearest = int(np.abs(at - step).argmin())
            words.append(tag("tspan", f"  {show(values[nearest])}", class_=f"c{line.color}"))
            dot = _dot(float(x.place(at[nearest])), float(y.place(values[nearest])), radius=3)
            dots.append(tag("g", dot, class_=f"c{line.color}"))
        on_the_right = place > (LEFT + WIDTH - RIGHT) / 2
        text = tag("text", *words, x=WIDTH - RIGHT if on_the_right else LEFT, y=10, text_anchor="end" if on_the_right else None)
        rule = tag("path", d=f"M{place:.1f} {TOP}V{HEIGHT - BOTTOM}")
        strip = tag("rect", x=f"{left:.1f}", y=0, width=f"{max(right - left, 0.1):.1f}", height=HEIGHT)
        readings.append(tag("g", strip, tag("g", rule, *dots, text, class_="reading"), class_="strip"))
    return readings


def bar(fraction: float, color: int = 0) -> Html:
    """Returns a slim bar, filled to a fraction."""
    return tag("div", tag("i", style=f"width:{100 * min(max(fraction, 0.0), 1.0):.1f}%", class_=f"c{color}"), class_="bar")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """Returns a table that scrolls by itself where it is too wide. The first cell of a row is its name."""
    header = [tag("tr", *(tag("th", cell, scope="col") for cell in head))] if head else []
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    return tag("div", tag("table", join(*header, *body, by="\n")), class_="scroll")
