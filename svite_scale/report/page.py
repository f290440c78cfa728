"""The report of a run: its pictures, and one HTML page that holds them all."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import cast

from timm.models import VisionTransformer
from torch import nn

from svite_scale.errors import ConfigError, RunError
from svite_scale.report.figures import (
    curves,
    dimmed,
    draw_curves,
    draw_densities,
    draw_patches,
    draw_units,
    kept_patches,
    layer_densities,
    named_selectors,
    unit_histories,
)
from svite_scale.saved_run import SavedRun, evaluation_images, load_model
from svite_scale.tracking.tracker import METRICS, TOPOLOGY

PAGE = "report.html"

STYLE = """
body { font-family: sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; }
td { padding: 0.1em 1.5em 0.1em 0; }
figure { margin: 1em 0; }
figcaption { color: #555; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption.

    Attributes:
        name: of its file, without the suffix.
        caption: a sentence or two.
        png: content of the file.
    """

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        pictures: in order.
        absence: why there are no pictures; empty if there are some.
    """

    title: str
    pictures: Sequence[Picture]
    absence: str = ""


def write_report(run: SavedRun, num_images: int, directory: Path) -> Path:
    """Draws a run, and writes its pictures and the page that holds them all.

    Args:
        run: to draw.
        num_images: evaluation images to show; at least 1.
        directory: to write to; made if missing.

    Returns:
        The path of the page.

    Raises:
        ConfigError, CheckpointError, DataError: a part of the run can't be read or used.
        RunError: the same, or the directory can't be written.
    """
    if num_images < 1:
        raise ConfigError("--images", num_images, "is no number of images", "use at least 1")
    model = load_model(run)
    sections = [patches_section(run, model, num_images), units_section(run, model), densities_section(run, model)]
    page = directory / PAGE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for section in sections:
            for picture in section.pictures:
                (directory / f"{picture.name}.png").write_bytes(picture.png)
        page.write_text(render(f"Run {run.run_dir.resolve().name}", _facts(run), sections), encoding="utf-8")
    except OSError as error:
        raise RunError(f"can't write to {directory} ({error}); give --out a folder that can be written") from error
    return page


def patches_section(run: SavedRun, model: nn.Module, num_images: int) -> Section:
    """Returns one picture per token selector: evaluation images, with the patches dimmed that it or an earlier one dropped."""
    title, selectors = "Patches kept by the token selector", named_selectors(model)
    if not selectors:
        return Section(title, [], "The run has no token selector (sparsity.tokens.keep is null): every block gets all patches.")
    images = evaluation_images(run.evaluation_config(), num_images)
    vit = cast(VisionTransformer, model)
    kept = kept_patches(vit, images.inputs).numpy()
    titles = [f"sample {sample}, label {label}" for sample, label in zip(images.samples, images.labels, strict=True)]
    pictures = []
    for (name, _), passing in zip(selectors, kept, strict=True):
        overlaid = dimmed(images.pixels.numpy(), passing, vit.patch_embed.grid_size)
        counts = f"{passing[0].sum()} of {passing.shape[1]} patches"
        caption = f"What block {name.removeprefix('selector')} and those after it get: {counts}; the dimmed ones are dropped."
        pictures.append(Picture(f"patches-{name}", caption, draw_patches(overlaid, titles)))
    return Section(title, pictures)


def units_section(run: SavedRun, model: nn.Module) -> Section:
    """Returns one picture of the heads of all layers, and one of their neurons."""
    title, histories = "Active heads and neurons", unit_histories(model, run.topology, run.run_dir / TOPOLOGY)
    if not histories:
        return Section(title, [], f"{TOPOLOGY} has no lines: the run is not sparse by heads or neurons, or didn't record them.")
    steps = [line["step"] for line in run.topology]
    pictures = []
    for unit in dict.fromkeys(history.unit for history in histories):
        own = [history for history in histories if history.unit == unit]
        caption = f"Coloured: the {unit} that are active, at the start (0) and after each update."
        pictures.append(Picture(unit, caption, draw_units(own, steps)))
    return Section(title, pictures)


def densities_section(run: SavedRun, model: nn.Module) -> Section:
    """Returns a picture of the density of each sparse layer, and one of the metrics over time."""
    pictures = []
    if densities := layer_densities(model):
        caption = "Active fraction of each sparse layer's weights, heads or neurons. Layers that aren't listed are dense."
        pictures.append(Picture("densities", caption, draw_densities(densities)))
    if drawn := curves(run.metrics):
        caption = "Fraction of all weights, heads or neurons that was ever active, and of the active ones that an update drops."
        pictures.append(Picture("curves", caption, draw_curves(drawn)))
    absence = "" if pictures else f"The model has no sparse layers, and {METRICS} has no figures of an update."
    return Section("Density", pictures, absence)


def _facts(run: SavedRun) -> dict[str, str]:
    return {
        "checkpoint": f"{run.checkpoint.name}, after {run.step:,} optimizer steps; nothing after them is shown",
        "model": f"{run.config.model.name}, {run.config.model.image_size} px",
        "method": str(run.config.sparsity.method),
    }


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Returns the page as HTML: heading, a table of facts, and the sections. The pictures are inside."""
    rows = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<table>
{rows}
</table>
{body}
</body>
</html>
"""


def _section(section: Section) -> str:
    absence = f"<p>{escape(section.absence)}</p>" if section.absence else ""
    figures = "\n".join(_figure(picture) for picture in section.pictures)
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{absence}{figures}\n</section>"


def _figure(picture: Picture) -> str:
    source = f"data:image/png;base64,{b64encode(picture.png).decode()}"
    caption = escape(picture.caption)
    return f'<figure><img src="{source}" alt="{escape(picture.name)}"><figcaption>{caption}</figcaption></figure>'
