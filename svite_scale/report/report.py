"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from timm.models import VisionTransformer
from torch import nn

from svite_scale.errors import RunError
from svite_scale.report.densities import curves, layer_densities
from svite_scale.report.evaluation_images import evaluation_images
from svite_scale.report.figures import dimmed, draw_curves, draw_densities, draw_patches, draw_units
from svite_scale.report.kept_patches import kept_patches, named_selectors
from svite_scale.report.page import Picture, Section, render
from svite_scale.report.saved_run import SavedRun, load_model
from svite_scale.report.unit_history import unit_histories
from svite_scale.tracking.tracker import METRICS, TOPOLOGY

PAGE = "report.html"


def write_report(run: SavedRun, num_images: int, directory: Path) -> Path:
    """Draws a run and writes each picture, and the page that holds them all, into a directory.

    Returns:
        The page.

    Raises:
        CheckpointError, DataError, RunError, ConfigError: something of the run can't be read, or the directory not be written.
    """
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
    """One picture per token selector: evaluation images in which what it and those before it dropped is dimmed."""
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
    """One picture of all layers' heads, one of all their neurons."""
    title, histories = "Active heads and neurons", unit_histories(model, run.topology, run.run_dir / TOPOLOGY)
    if not histories:
        return Section(title, [], f"{TOPOLOGY} has no lines: the run is not sparse by heads or neurons, or didn't record them.")
    steps = [line["step"] for line in run.topology]
    pictures = []
    for unit in dict.fromkeys(history.unit for history in histories):
        own = [history for history in histories if history.unit == unit]
        caption = f"Coloured: the {unit} that are active, from the start (0) and from each update on, up to the next."
        pictures.append(Picture(unit, caption, draw_units(own, steps)))
    return Section(title, pictures)


def densities_section(run: SavedRun, model: nn.Module) -> Section:
    """The density of each sparse layer, and what the metrics say over time."""
    pictures = []
    if densities := layer_densities(model):
        caption = "Share of each sparse layer's weights, heads or neurons that is active; layers that aren't listed are dense."
        pictures.append(Picture("densities", caption, draw_densities(densities)))
    if shares := curves(run.metrics):
        caption = (
            "Share of all weights, heads or neurons that was ever active, and share of the active ones that an update moves."
        )
        pictures.append(Picture("curves", caption, draw_curves(shares)))
    absence = "" if pictures else f"The model has no sparse layers, and {METRICS} no figures of an update."
    return Section("Density", pictures, absence)


def _facts(run: SavedRun) -> dict[str, str]:
    return {
        "checkpoint": f"{run.checkpoint.name}, after {run.step:,} optimizer steps; nothing after them is shown",
        "model": f"{run.config.model.name}, {run.config.model.image_size} px",
        "method": run.config.sparsity.method,
    }
