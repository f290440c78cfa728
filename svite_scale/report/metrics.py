"""Charts of a run's metrics over its optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from svite_scale.report import numbers
from svite_scale.report.charts import Format, Series, line_chart
from svite_scale.report.html import tag
from svite_scale.report.section import Runs, Section, run_label

NUM_COLORS = 6
"""Colors of the style sheet."""


class Chart(NamedTuple):
    """A chart of metrics that belong together.

    Attributes:
        title: its heading.
        lines: labels by metric.
        show: writes a value.
        from_zero: the vertical axis begins at 0.
    """

    title: str
    lines: Mapping[str, str]
    show: Format = numbers.plain
    from_zero: bool = False


EVALUATED = {"": "training", "eval_": "evaluation", "eval_ema_": "evaluation, EMA"}
UNITS = {"": "weights", "blocks/": "blocks", "heads/": "heads", "neurons/": "neurons"}
TRAINING = (
    Chart("Loss", {f"{prefix}loss": label for prefix, label in EVALUATED.items()}),
    Chart("Accuracy", {f"{prefix}accuracy": label for prefix, label in EVALUATED.items()}, numbers.percent),
    Chart("Learning rate", {"lr": "last"}, from_zero=True),
    Chart("Norm of the gradient", {"grad_norm": "last"}),
    Chart("Images per second", {"samples_per_second": "last"}, from_zero=True),
    Chart("Time of a step", {"step_seconds": "last"}, numbers.duration, from_zero=True),
    Chart("Waiting for data", {"data_wait": "last"}, numbers.percent, from_zero=True),
    Chart(
        "FLOP/s",
        {"flops_per_second": "achieved", "dense_flops_per_second": "the dense twin would need"},
        numbers.count,
        from_zero=True,
    ),
    Chart("Peak memory", {"peak_memory_bytes": "last"}, numbers.size, from_zero=True),
)
MOVES = (
    Chart("Ever active", {f"{unit}ever_active": label for unit, label in UNITS.items()}, numbers.percent),
    Chart("Active since the start", {f"{unit}initial_survival": label for unit, label in UNITS.items()}, numbers.percent),
    Chart("Survival of the grown", {f"{unit}grown_survival": label for unit, label in UNITS.items()}, numbers.percent),
    Chart("Drop fraction", {f"{unit}drop_fraction": label for unit, label in UNITS.items()}, numbers.percent, from_zero=True),
    *(
        Chart(
            f"{label.capitalize()} moved",
            {f"{unit}dropped": "dropped", f"{unit}grown": "grown", f"{unit}regrown": "grown back at once"},
            from_zero=True,
        )
        for unit, label in UNITS.items()
    ),
)


def charts(title: str, runs: Runs, wanted: Sequence[Chart], lead: str = "") -> Section | None:
    """Returns a section of those charts of which a run has a metric: for several runs, one per metric, with a line per run."""
    if len(runs) > 1:
        wanted = [
            chart._replace(title=f"{chart.title}, {label}" if len(chart.lines) > 1 else chart.title, lines={metric: label})
            for chart in wanted
            for metric, label in chart.lines.items()
        ]
    drawn = [
        line_chart(chart.title, series, chart.show, from_zero=chart.from_zero)
        for chart in wanted
        if (series := _series(runs, chart.lines))
    ]
    return Section(title, tag("div", *drawn, class_="charts"), lead) if drawn else None


def _series(runs: Runs, lines: Mapping[str, str]) -> list[Series]:
    """Returns the lines of a chart, by its labels or by the names of the runs."""
    if len(runs) == 1:
        found = [(label, runs[0].curve(metric)) for metric, label in lines.items()]
    else:
        found = [(run_label(runs, run), run.curve(metric)) for metric in lines for run in runs]
    return [
        Series(label, curve.steps, curve.values, number % NUM_COLORS)
        for number, (label, curve) in enumerate(found)
        if curve.values
    ]


def topology(runs: Runs) -> Section | None:
    """Returns how weights, blocks, heads and neurons moved."""
    if not any(line for run in runs for line in run.metrics if any(name.endswith("ever_active") for name in line)):
        return None
    lead = "Each update drops some of the active weights, blocks, heads or neurons, and grows as many."
    return charts("Topology", runs, MOVES, lead)
