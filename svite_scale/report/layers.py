"""The layers of a run: their densities, and the heads and neurons that were active after each update."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from svite_scale.report import numbers
from svite_scale.report.html import Html, join, tag
from svite_scale.report.reported_run import number
from svite_scale.report.section import Pictures, Runs, Section, heading, of_run
from svite_scale.saved_run import Line, damaged_line
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.layers.units import UnitLayer
from svite_scale.tracking.tracker import TOPOLOGY

UNIT_COLOR = (77, 137, 230)
"""Of active heads and neurons; in between the first color of a light page and that of a dark one."""

MAX_ROWS, MAX_COLUMNS = 64, 256


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


def layer_densities(model: nn.Module) -> dict[str, float]:
    """Returns the active fraction of each sparse layer's weights, blocks, heads or neurons, in the model's order.

    Args:
        model: not wrapped by any engine; on any device.
    """
    return {name: layer.num_active / layer.shape.numel() for name, layer in sparse_layers(model).items()}


def last_update(metrics: Sequence[Line], figure: str) -> dict[str, float]:
    """Returns a figure of the last topology update by layer, from lines of ``metrics.jsonl``; empty if none has it."""
    prefix = f"layers/{figure}/"
    for line in reversed(metrics):
        found = {name.removeprefix(prefix): number(line, name) for name in line if name.startswith(prefix)}
        if found:
            return {name: value for name, value in found.items() if math.isfinite(value)}
    return {}


def picture_of_units(active: npt.NDArray[np.bool_]) -> bytes:
    """Returns a PNG of the units of a layer over its updates: a row per unit, a column per update, clear where it is absent.

    If there are more than :data:`MAX_ROWS` units, those that were active longest come first, and a row is the mean of several.

    Args:
        active: bool ``[N, updates + 1]``.
    """
    rows = active.astype(np.float64)
    if len(rows) > MAX_ROWS:
        order = np.argsort(-rows.sum(axis=1), kind="stable")
        rows = np.stack([part.mean(axis=0) for part in np.array_split(rows[order], MAX_ROWS)])
    if rows.shape[1] > MAX_COLUMNS:
        rows = rows[:, np.linspace(0, rows.shape[1] - 1, MAX_COLUMNS).round().astype(int)]
    pixels = np.empty((*rows.shape, 4), dtype=np.uint8)
    pixels[..., :3], pixels[..., 3] = UNIT_COLOR, (255 * rows).round()
    content = BytesIO()
    Image.fromarray(pixels).save(content, "png", optimize=True)
    return content.getvalue()


def split_name(layer: str) -> tuple[str, str]:
    """Returns the block that a layer is in, and its name there: ``("3", "attn.qkv")`` for ``blocks.3.attn.qkv``,
    ``("stages.0.2", "conv_dw")`` for ``stages.0.blocks.2.conv_dw``, and ``("", "head")`` for a layer that is in no block.
    """
    found = re.fullmatch(r"(.*\.\d+)\.(.+)", layer)
    return (re.sub(r"\bblocks\.", "", found[1]), found[2]) if found else ("", layer)


HEATS = (
    ("ever_active", "Ever active", "Part of each layer that was active at any time."),
    ("grown_survival", "Survival of the grown", "Part of what the update before last grew that the last one left."),
)


def layers(runs: Runs) -> Section | None:
    """Returns the density of each layer, and what the last update says of it."""
    parts = []
    for run in runs:
        densities = layer_densities(run.model)
        units = " and ".join(dict.fromkeys(layer.unit for layer in sparse_layers(run.model).values()))
        note = f"Active part of each layer's {units}. Layers that aren't listed are dense."
        tables = [_heat("Density", note, densities, densities)]
        tables += [_heat(title, note, last_update(run.metrics, figure), densities) for figure, title, note in HEATS]
        if shown := [each for each in tables if each]:
            parts += [*heading(runs, run), tag("div", *shown, class_="tables")]
    return Section("Layers", join(*parts)) if parts else None


def _heat(title: str, note: str, values: Mapping[str, float], order: Iterable[str]) -> Html | None:
    """Returns a card with a table of layers, in ``order``, a row per block of the model, coloured by value; None without
    values.
    """
    places = {name: split_name(name) for name in order}
    if not places.keys() & values.keys():
        return None
    rows = list(dict.fromkeys(row for row, _ in places.values() if row))
    columns = list(dict.fromkeys(column for row, column in places.values() if row))
    by_place = {place: values[name] for name, place in places.items() if name in values}
    cells = [[_heat_cell(by_place.get((row, column))) for column in columns] for row in rows]
    body = [tag("tr", tag("th", row, scope="row"), *line) for row, line in zip(rows, cells, strict=True)]
    body += [
        tag("tr", tag("th", column, scope="row", colspan=max(1, len(columns))), _heat_cell(by_place.get(("", column))))
        for row, column in places.values()
        if not row
    ]
    names = ["block", *columns] if rows else []
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    grid = tag("div", tag("table", head, *body), class_="scroll heat")
    return tag("div", tag("h3", title), tag("div", note, class_="note"), grid, class_="card")


def _heat_cell(value: float | None) -> Html:
    if value is None:
        return tag("td")
    strength = 8 + 52 * min(max(value, 0.0), 1.0)
    return tag("td", numbers.percent(value), style=f"background:color-mix(in srgb,var(--c0) {strength:.0f}%,transparent)")


def units(runs: Runs, pictures: Pictures) -> Section | None:
    """Returns a picture for each layer of heads or neurons: which were active after each update."""
    parts = []
    for run_number, run in enumerate(runs, start=1):
        histories = unit_histories(run.model, run.topology, run.run_dir / TOPOLOGY)
        for unit in dict.fromkeys(history.unit for history in histories):
            strips = [_strip(history, pictures, run_number) for history in histories if history.unit == unit]
            head = tag("h4", f"{of_run(runs, run)}{unit.capitalize()}")
            parts += [head, tag("div", tag("div", *strips, class_="strips"), class_="card")]
    lead = (
        "Coloured: active, from the start at the left to the last update at the right. A row is a head; of many neurons, those "
        "that were active longest come first."
    )
    return Section("Heads and neurons", join(*parts), lead) if parts else None


def _strip(history: UnitHistory, pictures: Pictures, run_number: int) -> Html:
    """Returns the picture of one layer, with the number of units that are active at the end."""
    alt = f"active {history.unit} of {history.layer}"
    image = pictures.add(f"run{run_number}-{history.layer}.png", picture_of_units(history.active), alt)
    block, _ = split_name(history.layer)
    active = history.active[:, -1]
    words = tag("span", f"block {block}" if block else history.layer), tag("span", f"{active.sum():,} of {len(active):,}")
    return tag("figure", image, tag("figcaption", *words), class_="units")
