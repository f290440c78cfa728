"""Charts: where points stand, what their axes say, and the numbers as text; and that markup can't be broken."""

from __future__ import annotations

import re

import numpy as np
import pytest

from svite_scale.report import numbers
from svite_scale.report.charts import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, WIDTH, Series, line_chart, round_ticks, shortened
from svite_scale.report.html import join, tag


def points(chart: str) -> list[tuple[float, float]]:
    """The points of the first line."""
    (path,) = re.findall(r'class="line c0"><path d="M([^"]*)"', chart)
    return [(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))]


def test_line_chart_places_points_on_both_axes() -> None:
    chart = line_chart("Loss", [Series("training", [0, 50, 100], [2.0, 1.0, 0.0])])
    found = points(chart)
    assert [x for x, _ in found] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert found[2][1] == HEIGHT - BOTTOM
    assert found[1][1] == pytest.approx((found[0][1] + found[2][1]) / 2, abs=0.1)
    # 0, 0.5, 1, ... beside the plot, each at the height of that value
    ticks = re.findall(r'y="([\d.]+)" dy="0.32em" text-anchor="end">([^<]+)<', chart)
    per_unit = (found[2][1] - found[0][1]) / 2
    assert [text for _, text in ticks] == ["0", "0.5", "1", "1.5", "2"]
    for place, text in ticks:
        assert float(place) == pytest.approx(found[2][1] - float(text) * per_unit, abs=0.15)


def test_line_chart_reads_the_nearest_value_of_every_line() -> None:
    lines = [Series("a", [0, 10, 20], [1.0, 2.0, 3.0]), Series("b", [0, 20], [5.0, 7.0], color=1)]
    chart = line_chart("Loss", lines)
    readings = re.findall(r"<tspan>step ([^<]+)</tspan>" + r'<tspan class="c\d">  ([^<]+)</tspan>' * 2, chart)
    assert readings == [("0", "1", "5"), ("10", "2", "5"), ("20", "3", "7")]
    assert re.findall(r"([ab]) <b>([^<]+)</b>", chart) == [("a", "3"), ("b", "7")]


@pytest.mark.parametrize("values", [[0.0], [5.0], [-1.0, -1.0], [1e-12, 1e12], [0.95, 0.951], [-1e25, -1e25]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_line_chart_draws_any_finite_values(values: list[float], from_zero: bool) -> None:
    chart = line_chart("x", [Series("x", list(range(1, len(values) + 1)), values)], from_zero=from_zero)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points(chart))
    assert "nan" not in chart


def test_shortened_takes_means_of_equal_stretches() -> None:
    steps, values = shortened(range(10), [*range(9), 99], most=5)
    np.testing.assert_array_equal(steps, [0.5, 2.5, 4.5, 6.5, 8.5])
    np.testing.assert_array_equal(values, [0.5, 2.5, 4.5, 6.5, 53.5])
    whole = list(range(MAX_POINTS))
    assert shortened(whole, whole)[1].tolist() == whole


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1240, [0, 500, 1000]),
        (0.31, 0.58, [0.4, 0.5]),
        (-3, 3, [-2, 0, 2]),
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
    ],
)
def test_round_ticks_are_multiples_of_a_round_step(low: float, high: float, expected: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.plain(1240), "1,240"),
        (numbers.plain(0.00293), "0.00293"),
        (numbers.plain(1e-5), "1e-05"),
        (numbers.plain(999_999), "999,999"),
        (numbers.plain(2_400_000), "2.4 M"),
        (numbers.plain(0), "0"),
        (numbers.percent(0.955), "95.5%"),
        (numbers.percent(0.9), "90%"),
        (numbers.percent(0.99999), "100%"),
        (numbers.size(0), "0 B"),
        (numbers.size(999), "999 B"),
        (numbers.size(1_234_567), "1.23 MB"),
        (numbers.size(999_999), "1 MB"),
        (numbers.scaled(4.6e9, ""), "4.6 G"),
        (numbers.scaled(0.25, "FLOP/s"), "0.25 FLOP/s"),
        (numbers.scaled(3.2e18, ""), "3,200 P"),
        (numbers.duration(0.0123), "12.3 ms"),
        (numbers.duration(7.25), "7.25 s"),
        (numbers.duration(59.99), "1 min"),
        (numbers.duration(90.2), "1 min 30 s"),
        (numbers.duration(3599.9), "1 h"),
        (numbers.duration(7500), "2 h 5 min"),
        (numbers.duration(90_000), "1 d 1 h"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


def test_tag_escapes_text_and_attributes_but_no_markup() -> None:
    inner = tag("b", "<i>", title='"><script>')
    assert inner == '<b title="&quot;&gt;&lt;script&gt;">&lt;i&gt;</b>'
    assert tag("p", inner, "&", class_="x", data_note=None) == f'<p class="x">{inner}&amp;</p>'
    assert join("<", inner, by="\n") == f"&lt;\n{inner}"
