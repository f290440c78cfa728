"""The report of a run, or of several side by side: one HTML page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from svite_scale.data.format.files import replacing
from svite_scale.errors import ConfigError, RunError
from svite_scale.report import numbers
from svite_scale.report.cost import cost
from svite_scale.report.evaluation import evaluation
from svite_scale.report.html import Html, join, tag
from svite_scale.report.layers import layers, units
from svite_scale.report.metrics import TRAINING, charts, topology
from svite_scale.report.patches import patches
from svite_scale.report.reported_run import ReportedRun, read_reported_run
from svite_scale.report.section import Pictures, Section, run_label
from svite_scale.report.summary import cards, configuration, key_numbers, sparsity_of, summary

PAGE, PICTURES = "report.html", "pictures"
PICTURE = re.compile(r"run\d+-.+\.(png|webp)")
"""Names of pictures, whose numbers are those of the runs on the page."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page runs no scripts and loads nothing, whatever stands in a run's files."""


def write_report(
    run_dirs: Sequence[Path], directory: Path, *, checkpoint: str | None = None, val: str | None = None, num_images: int = 8
) -> Path:
    """Reads runs, finished or not, and writes their page; and its pictures once more, as files in ``pictures/``.

    Args:
        run_dirs: of the runs; several are compared.
        directory: to write to; made if missing.
        checkpoint: name of the checkpoint, of a single run; None takes the newest valid one, and all metrics.
        val: evaluation shards, in place of the config's ``data.val``.
        num_images: evaluation images to show; at least 1.

    Returns:
        The path of the page.

    Raises:
        ConfigError, CheckpointError, DataError: a part of a run can't be read or used.
        RunError: the same, or the directory can't be written.
    """
    if num_images < 1:
        raise ConfigError("--images", num_images, "is no number of images", "use at least 1")
    if checkpoint is not None and len(run_dirs) > 1:
        raise ConfigError("--checkpoint", checkpoint, f"names a checkpoint of one run, not of {len(run_dirs)}", "leave it out")
    runs = [read_reported_run(run_dir, checkpoint, val) for run_dir in run_dirs]
    pictures = Pictures()
    found = [
        summary(runs),
        charts("Training", runs, TRAINING),
        evaluation(runs, pictures),
        topology(runs),
        layers(runs),
        units(runs, pictures),
        patches(runs, num_images, pictures),
        cost(runs),
        configuration(runs),
    ]
    page = directory / PAGE
    content = render(runs, [section for section in found if section], pictures.notes)
    try:
        _write_pictures(directory / PICTURES, pictures.files)
        with replacing(page) as path:
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise RunError(f"can't write to {directory} ({error}); give --out a folder that can be written") from error
    return page


def _write_pictures(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the pictures of a page, in place of those that an earlier report left; makes the folder of the page.

    Raises:
        OSError: they can't be written.
        RunError: a folder is a link. The run may be somebody else's, so its links aren't followed.
    """
    for each in (folder.parent, folder):
        if each.is_symlink():
            raise RunError(f"{each} is a link, which a report doesn't follow; remove it, or give --out a folder that is none")
    (folder if files else folder.parent).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(folder / name) as path:
            path.write_bytes(content)
    for path in folder.glob("run*-*"):
        if path.name not in files and PICTURE.fullmatch(path.name):
            path.unlink()


def render(runs: Sequence[ReportedRun], parts: Sequence[Section], notes: Sequence[str]) -> Html:
    """Returns the page."""
    title = " and ".join(run_label(runs, run) for run in runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(Path(__file__).with_name("page.css").read_text())),
    )
    body = join(
        _header(title, runs),
        tag("nav", *(tag("a", part.title, href=f"#{part.anchor}") for part in parts)),
        *([cards(key_numbers(runs[0]))] if len(runs) == 1 else []),
        *map(_section, parts),
        _footer(notes),
        by="\n",
    )
    return Html(f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{body}\n</body>\n</html>\n')


def _header(title: str, runs: Sequence[ReportedRun]) -> Html:
    if len(runs) > 1:
        return tag("header", tag("div", tag("h1", title), class_="title"), tag("p", "runs compared", class_="lead"))
    (run,) = runs
    model = f"{run.config.model.name}, {run.config.model.image_size} px, {sparsity_of(run)}"
    return tag("header", tag("div", tag("h1", title), _status(run), class_="title"), tag("p", model, class_="lead"))


def _status(run: ReportedRun) -> Html:
    if run.is_finished:
        return tag("span", "finished", class_="pill done")
    total = run.total_steps
    done = f"{numbers.percent(run.step / total)} done" if total else f"{run.step:,} steps done"
    return tag("span", f"not finished, {done}", class_="pill")


def _section(section: Section) -> Html:
    lead = [tag("p", section.lead, class_="lead")] if section.lead else []
    return tag("section", tag("h2", section.title, id=section.anchor), *lead, section.content)


def _footer(notes: Sequence[str]) -> Html:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return tag("footer", *(tag("p", note) for note in notes), tag("p", f"Written by svite_scale on {now}."))
