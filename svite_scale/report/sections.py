"""The sections of a report. Each is made of one run or of several, and is missing where these have nothing to show in it."""

from __future__ import annotations

import statistics
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from timm.models import VisionTransformer

from svite_scale.config.load import flatten_config, to_dict, to_yaml
from svite_scale.cost.memory import ModelSize, bytes_per_rank, model_sizes
from svite_scale.cost.traffic import sent_per_step
from svite_scale.errors import DataError, RunError
from svite_scale.export.model_card import run_tables
from svite_scale.export.model_card import summary as card_summary
from svite_scale.report import numbers
from svite_scale.report.charts import Format, Series, bar, line_chart, table
from svite_scale.report.evaluation_files import read_evaluation
from svite_scale.report.html import Html, join, tag
from svite_scale.report.layers import last_update, layer_densities, picture_of_units, split_name, unit_histories
from svite_scale.report.patches import dimmed, is_small, kept_patches, named_selectors, picture_of_image
from svite_scale.report.reported_run import ReportedRun
from svite_scale.saved_run import evaluation_images
from svite_scale.tracking.tracker import TOPOLOGY

NUM_COLORS = 6
"""Colors of the style sheet."""

Runs = Sequence[ReportedRun]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        content: of the section.
        lead: a sentence under the heading; may be empty.
    """

    title: str
    content: Html
    lead: str = ""

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Pictures:
    """Collects the pictures of a page, which are in it and beside it.

    Attributes:
        files: contents by file name.
        notes: why pictures are missing that the run could have.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, content: bytes, alt: str, **attributes: object) -> Html:
        """Returns an ``img`` element that holds a picture; ``name`` has the suffix of its format."""
        self.files[name] = content
        source = f"data:image/{name.rpartition('.')[2]};base64,{b64encode(content).decode()}"
        return tag("img", src=source, alt=alt, **attributes)


class KeyNumber(NamedTuple):
    """A number of a run that a reader looks for first.

    Attributes:
        label: its name.
        value: as text.
        note: what belongs to it; may be empty.
        fraction: of the dense twin's, if it is compared with that.
    """

    label: str
    value: str
    note: str = ""
    fraction: float | None = None


def key_numbers(run: ReportedRun) -> list[KeyNumber]:
    """Returns the numbers at the top of the page."""
    return [*_accuracies(run), *_progress(run), *_sizes(run), *_speed(run)]


def _accuracies(run: ReportedRun) -> Iterator[KeyNumber]:
    for prefix, label in (("eval_", "Accuracy"), ("eval_ema_", "Accuracy, EMA")):
        accuracies = run.curve(f"{prefix}accuracy")
        if accuracies.values:
            best, step = max(zip(accuracies.values, accuracies.steps, strict=True))
            notes = [f"top 5 {numbers.percent(top5)}"] if (top5 := run.last(f"{prefix}top5")) is not None else []
            if best > accuracies.values[-1]:
                notes.append(f"best {numbers.percent(best)} at step {step:,}")
            yield KeyNumber(label, numbers.percent(accuracies.values[-1]), ", ".join(notes))


def _progress(run: ReportedRun) -> Iterator[KeyNumber]:
    total, epoch = run.total_steps, run.last("epoch")
    notes = [f"epoch {epoch:.4g} of {run.config.train.epochs}"] if epoch is not None else []
    if run.is_finished and "seconds" in run.summary:
        notes.append(numbers.duration(run.summary["seconds"]))
    yield KeyNumber(
        "Steps", f"{run.step:,}" if run.is_finished or total is None else f"{run.step:,} / {total:,}", ", ".join(notes)
    )


def _sizes(run: ReportedRun) -> Iterator[KeyNumber]:
    cost = run.cost
    fraction = cost.params_active / cost.params_dense
    of = f"of {numbers.scaled(cost.params_dense, '')}"
    yield KeyNumber("Active parameters", numbers.scaled(cost.params_active, ""), of, fraction)
    macs, of = numbers.scaled(cost.sparse_macs, ""), f"of {numbers.scaled(cost.dense_macs, '')}, forward"
    yield KeyNumber("MACs of an image", macs, of, cost.sparse_macs / cost.dense_macs)
    for label, kinds in (("Training state", held(run)), ("Sent in a step", sent(run))):
        if dense := sum(each.dense for each in kinds):
            sparse = sum(each.sparse for each in kinds)
            yield KeyNumber(label, numbers.size(sparse), f"of {numbers.size(dense)}, per rank", sparse / dense)


def _speed(run: ReportedRun) -> Iterator[KeyNumber]:
    def typical(name: str) -> float | None:
        """Returns the median of the second half of a metric's values, where the start no longer counts."""
        values = run.curve(name).values
        return statistics.median(values[len(values) // 2 :]) if values else None

    if (speed := typical("samples_per_second")) is not None:
        step = typical("step_seconds")
        yield KeyNumber(
            "Images per second", numbers.plain(round(speed)), "" if step is None else f"{numbers.duration(step)} a step"
        )
    if (wait := typical("data_wait")) is not None:
        yield KeyNumber("Waiting for data", numbers.percent(wait), "of the step")
    if (flops := typical("flops_per_second")) is not None:
        dense = typical("dense_flops_per_second")
        yield KeyNumber(
            "Achieved", numbers.scaled(flops, "FLOP/s"), f"dense needs {numbers.scaled(dense, 'FLOP/s')}" if dense else ""
        )
    if peak := run.curve("peak_memory_bytes").values:
        yield KeyNumber("Peak memory", numbers.size(max(peak)), "of the fullest rank")


def cards(found: Sequence[KeyNumber]) -> Html:
    """Returns the key numbers of one run as cards."""
    rows = -(-len(found) // 6)
    return tag("div", *map(_card, found), class_="grid-cards", style=f"--columns:{-(-len(found) // rows)}")


def _card(number: KeyNumber) -> Html:
    parts = [tag("div", number.label, class_="label"), tag("div", number.value, class_="value")]
    note = number.note
    if number.fraction is not None:
        parts.append(bar(number.fraction))
        note = f"{numbers.percent(number.fraction)} {note}"
    return tag("div", *parts, tag("div", note, class_="note"), class_="card number")


def summary(runs: Runs) -> Section:
    """Returns what was trained, and for several runs their key numbers side by side and the options that differ."""
    if len(runs) == 1:
        (run,) = runs
        if run.saved is None:
            return Section("Summary", _list(_facts(run), "card facts"))
        card = [
            tag("div", tag("h3", title), _list(rows, "narrow facts"))
            for title, rows in run_tables(run.saved, run.model).items()
        ]
        folded = tag("details", tag("summary", "Model card"), tag("div", *card, class_="tables"))
        return Section("Summary", join(_list(_facts(run), "card facts"), folded), card_summary(run.saved, run.model))
    found = [{number.label: number for number in key_numbers(run)} for run in runs]
    labels = dict.fromkeys(label for each in found for label in each)
    rows = [[label, *(_cell(each[label]) if label in each else "–" for each in found)] for label in labels]
    parts = [tag("div", table(["", *(run_label(runs, run) for run in runs)], rows), class_="card")]
    options = [flatten_config(to_dict(run.config)) for run in runs]
    differing = [key for key in options[0] if key != "run_dir" and len({str(each.get(key)) for each in options}) > 1]
    if differing:
        rows = [[key, *(str(each.get(key)) for each in options)] for key in differing]
        parts += [
            tag("h4", "Options that differ"),
            tag("div", table(["", *(run_label(runs, run) for run in runs)], rows), class_="card"),
        ]
    return Section("Summary", join(*parts))


def _list(rows: Mapping[str, str], kind: str) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows.items()), class_=kind)


def _cell(number: KeyNumber) -> str:
    return number.value if number.fraction is None else f"{number.value} ({numbers.percent(number.fraction)})"


def _facts(run: ReportedRun) -> dict[str, str]:
    config, train, optimizer = run.config, run.config.train, run.config.optimizer
    zero = f" ZeRO-{config.parallel.zero_stage}" if config.parallel.backend == "deepspeed" else ""
    ranks = [] if run.world_size is None else [f"{run.world_size} rank" + "s" * (run.world_size > 1)]
    return {
        "Model": f"{config.model.name}, {config.model.image_size} px, {config.model.num_classes} classes",
        "Sparsity": sparsity_of(run),
        "Engine": ", ".join(
            [config.parallel.backend + zero, *ranks, train.precision, *([run.summary["device"]] if run.summary else [])]
        ),
        "Training": f"{train.epochs} epochs, batches of {train.global_batch_size:,}",
        "Optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}",
        "Data": config.data.train,
        "Seed": str(config.seed),
        "Checkpoint": run.saved.checkpoint.name if run.saved else "none yet",
        "Directory": str(run.run_dir.resolve()),
    }


def sparsity_of(run: ReportedRun) -> str:
    """Returns in a few words what is sparse."""
    sparsity = run.config.sparsity
    parts = [str(sparsity.method)]
    if (density := run.last("density")) is not None:
        parts.append(f"density {density:.3g}")
    parts += [
        f"{numbers.percent(kept)} of the {unit}"
        for unit, kept in (("heads", sparsity.structured.heads), ("neurons", sparsity.structured.neurons))
        if kept < 1
    ]
    if (tokens := run.last("tokens")) is not None:
        parts.append(f"{tokens:.0f} tokens pass")
    return ", ".join(parts)


LABELS = {"accuracy": "accuracy", "top5": "top 5", "calibration_error": "calibration error"}
HARDEST = 10
"""Number of classes that are named."""


def evaluation(runs: Runs, pictures: Pictures) -> Section | None:
    """Returns what ``launch/evaluate.py`` has found of the runs' checkpoints, of the weights and of their moving average."""
    parts = []
    for number, run in enumerate(runs, start=1):
        for ema in (False, True):
            found = read_evaluation(run.saved.evaluation_folder(ema=ema)) if run.saved else None
            if found is None:
                continue
            rows = [[label, numbers.percent(found.numbers[name])] for name, label in LABELS.items() if name in found.numbers]
            rows += [[name, numbers.plain(found.numbers[name])] for name in ("loss", "samples") if name in found.numbers]
            shown = [tag("div", tag("h3", "All samples"), table([], rows), class_="card")]
            if found.classes:
                rows = [[each.name, numbers.percent(each.accuracy), f"{each.samples:,}"] for each in found.classes[:HARDEST]]
                hardest = table(["", "accuracy", "samples"], rows)
                shown.append(tag("div", tag("h3", "Hardest classes"), hardest, class_="card"))
            if found.confusion is not None:
                name = f"run{number}-confusion{'-ema' * ema}.png"
                picture = pictures.add(name, found.confusion, "confusion matrix", class_="whole")
                shown.append(tag("div", tag("h3", "Confusion"), picture, class_="card"))
            head = [tag("h4", of_run(runs, run) + ("moving average" if ema else "weights"))] if ema or len(runs) > 1 else []
            parts += [*head, tag("div", *shown, class_="tables")]
    return Section("Evaluation", join(*parts), "By launch/evaluate.py, of the checkpoint.") if parts else None


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


def _flops(value: float) -> str:
    return numbers.scaled(value, "FLOP/s")


EVALUATED = {"": "training", "eval_": "evaluation", "eval_ema_": "evaluation, EMA"}
UNITS = {"": "weights", "heads/": "heads", "neurons/": "neurons"}
TRAINING = (
    Chart("Loss", {f"{prefix}loss": label for prefix, label in EVALUATED.items()}),
    Chart("Accuracy", {f"{prefix}accuracy": label for prefix, label in EVALUATED.items()}, numbers.percent),
    Chart("Learning rate", {"lr": "last"}),
    Chart("Norm of the gradient", {"grad_norm": "last"}),
    Chart("Images per second", {"samples_per_second": "last"}, from_zero=True),
    Chart("Time of a step", {"step_seconds": "last"}, numbers.duration, from_zero=True),
    Chart("Waiting for data", {"data_wait": "last"}, numbers.percent, from_zero=True),
    Chart(
        "FLOP/s",
        {"flops_per_second": "achieved", "dense_flops_per_second": "the dense twin would need"},
        _flops,
        from_zero=True,
    ),
    Chart("Peak memory", {"peak_memory_bytes": "last"}, numbers.size, from_zero=True),
)
MOVES = (
    Chart("Ever active", {f"{unit}ever_active": label for unit, label in UNITS.items()}, numbers.percent),
    Chart("Active since the start", {f"{unit}initial_survival": label for unit, label in UNITS.items()}, numbers.percent),
    Chart("Survival of the grown", {f"{unit}grown_survival": label for unit, label in UNITS.items()}, numbers.percent),
    Chart("Drop fraction", {"drop_fraction": "last"}, numbers.percent, from_zero=True),
    *(
        Chart(
            f"{label.capitalize()} moved",
            {f"{unit}dropped": "dropped", f"{unit}grown": "grown anew", f"{unit}regrown": "grown back at once"},
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
    """Returns how weights, heads and neurons moved."""
    if not any(line for run in runs for line in run.metrics if any(name.endswith("ever_active") for name in line)):
        return None
    return charts("Topology", runs, MOVES, "Each update drops some of the active weights, heads or neurons, and grows as many.")


HEATS = (
    ("ever_active", "Ever active", "Part of each layer that was active at any time."),
    ("grown_survival", "Survival of the grown", "Part of what the update before last grew that the last one left."),
)


def layers(runs: Runs) -> Section | None:
    """Returns the density of each layer, and what the last update says of it."""
    parts = []
    for run in runs:
        densities = layer_densities(run.model)
        tables = [_heat("Density", "Active part of each layer. Layers that aren't listed are dense.", densities, densities)]
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
    head = (
        tag("tr", tag("th", "block", scope="col"), *(tag("th", column, scope="col") for column in columns)) if rows else Html()
    )
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
    for number, run in enumerate(runs, start=1):
        histories = unit_histories(run.model, run.topology, run.run_dir / TOPOLOGY)
        for unit in dict.fromkeys(history.unit for history in histories):
            strips = []
            for history in histories:
                if history.unit == unit:
                    active = history.active[:, -1]
                    name = f"run{number}-{history.layer}.png"
                    image = pictures.add(name, picture_of_units(history.active), f"active {unit} of {history.layer}")
                    count = f"{active.sum():,} of {len(active):,}"
                    block = split_name(history.layer)[0]
                    layer = tag("span", f"block {block}" if block else history.layer)
                    strips.append(tag("figure", image, tag("figcaption", layer, tag("span", count)), class_="units"))
            head = tag("h4", f"{of_run(runs, run)}{unit.capitalize()}")
            parts += [head, tag("div", tag("div", *strips, class_="strips"), class_="card")]
    if not parts:
        return None
    lead = (
        "Coloured: active, from the start at the left to the last update at the right. A row is a head; of many neurons, those "
        "that were active longest come first."
    )
    return Section("Heads and neurons", join(*parts), lead)


def patches(runs: Runs, num_images: int, pictures: Pictures) -> Section | None:
    """Returns evaluation images, with the patches dimmed that each token selector or an earlier one drops."""
    parts = []
    for number, run in enumerate(runs, start=1):
        if run.saved is None or not (selectors := named_selectors(run.model)):
            continue
        try:
            images = evaluation_images(run.saved.evaluation_config(), num_images)
        except (DataError, RunError) as error:
            pictures.notes.append(f"Kept patches are left out: {error}")
            continue
        vit = cast(VisionTransformer, run.model)
        kept = kept_patches(vit, images.inputs).numpy()
        parts += heading(runs, run)
        for (name, _), passing in zip(selectors, kept, strict=True):
            counts = f"{passing[0].sum()} of {passing.shape[1]} patches"
            overlaid = dimmed(images.pixels.numpy(), passing, vit.patch_embed.grid_size)
            figures = []
            for image, sample, label in zip(overlaid, images.samples.tolist(), images.labels.tolist(), strict=True):
                file = f"run{number}-{name}-sample{sample}.webp"
                alt = f"patches of sample {sample} that pass {name}"
                element = pictures.add(file, picture_of_image(image), alt, class_=None if is_small(image) else "photo")
                figures.append(tag("figure", element, tag("figcaption", f"sample {sample}, label {label}")))
            head = tag("h4", f"What block {name.removeprefix('selector')} and those after it get: {counts}")
            parts += [head, tag("div", tag("div", *figures, class_="patches"), class_="card")]
    return Section("Kept patches", join(*parts), "The token selectors drop the dimmed patches.") if parts else None


class Bytes(NamedTuple):
    """Bytes of one kind, of the sparse model and of its dense twin."""

    kind: str
    sparse: int
    dense: int


def held(run: ReportedRun) -> list[Bytes]:
    """Returns the bytes of training state that a rank holds; empty if the number of ranks isn't known."""
    config, ranks = run.config, run.world_size
    if ranks is None:
        return []
    ema = config.train.ema_decay is not None
    return _twins(run, lambda size: bytes_per_rank(config.parallel, config.train.precision, ranks, size, ema=ema))


def sent(run: ReportedRun) -> list[Bytes]:
    """Returns the bytes that a rank sends in a step; empty if the number of ranks isn't known."""
    config, ranks = run.config, run.world_size
    if ranks is None:
        return []
    steps = config.train.accumulation_steps
    return _twins(
        run, lambda size: sent_per_step(config.parallel, config.train.precision, ranks, size, accumulation_steps=steps)
    )


def _twins(run: ReportedRun, count: Callable[[ModelSize], Mapping[str, int]]) -> list[Bytes]:
    sparse, dense = (count(size) for size in model_sizes(run.model, run.cost))
    return [Bytes(kind, sparse[kind], dense[kind]) for kind in sparse if sparse[kind] or dense[kind]]


def cost(runs: Runs) -> Section:
    """Returns what the model costs beside its dense twin: bytes held, bytes sent, multiply-accumulates."""
    parts = []
    for run in runs:
        macs: dict[str, Bytes] = {}
        for layer in run.cost.layers:
            kind = split_name(layer.name)[1] or layer.name
            _, sparse, dense = macs.get(kind, Bytes(kind, 0, 0))
            macs[kind] = Bytes(kind, sparse + layer.sparse_macs, dense + layer.dense_macs)
        found = [
            _twin_table(
                "Training state of a rank", "Bytes that stay between steps, without activations.", held(run), numbers.size
            ),
            _twin_table("Sent by a rank in a step", "Bytes, if collectives go round a ring.", sent(run), numbers.size),
            _twin_table(
                "Forward of an image",
                "Multiply-accumulates, by layer, of all blocks together. Single absent weights make a product no faster.",
                list(macs.values()),
                lambda value: numbers.scaled(value, ""),
            ),
        ]
        parts += [*heading(runs, run), tag("div", *(each for each in found if each), class_="tables")]
    lead = "Computed from sizes. The dense twin is the same model with all weights, heads, neurons and tokens."
    return Section("Cost", join(*parts), lead)


def _twin_table(title: str, note: str, kinds: Sequence[Bytes], show: Format) -> Html | None:
    if not kinds:
        return None
    total = Bytes("all", sum(each.sparse for each in kinds), sum(each.dense for each in kinds))
    rows = [
        [kind, show(sparse), show(dense), numbers.percent(sparse / dense) if dense else "–"]
        for kind, sparse, dense in (*kinds, total)
    ]
    return tag(
        "div",
        tag("h3", title),
        tag("div", note, class_="note"),
        table(["", "sparse", "dense", "ratio"], rows),
        bar(total.sparse / total.dense),
        class_="card",
    )


def configuration(runs: Runs) -> Section:
    """Returns the resolved configs, folded away."""
    folded = [
        tag("details", tag("summary", f"{of_run(runs, run)}config.yaml"), tag("pre", to_yaml(run.config))) for run in runs
    ]
    return Section("Configuration", join(*folded))


def run_label(runs: Runs, run: ReportedRun) -> str:
    """Returns a run's name; with its folders, if another run has the same."""
    return run.name if sum(each.name == run.name for each in runs) == 1 else str(run.run_dir)


def of_run(runs: Runs, run: ReportedRun) -> str:
    """Returns the start of a heading that says which run it is about; empty if there is only one."""
    return "" if len(runs) == 1 else f"{run_label(runs, run)}: "


def heading(runs: Runs, run: ReportedRun) -> list[Html]:
    """Returns the heading of one run's part of a section; none if there is only one run."""
    return [] if len(runs) == 1 else [tag("h4", run_label(runs, run))]
