"""The head of a page: key numbers, what was trained, and how runs differ; and the configs at its foot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from svite_scale.config.load import flatten_config, to_dict, to_yaml
from svite_scale.export.model_card import run_tables
from svite_scale.export.model_card import summary as card_summary
from svite_scale.report import numbers
from svite_scale.report.charts import bar, table
from svite_scale.report.cost import held, sent
from svite_scale.report.html import Html, join, tag
from svite_scale.report.reported_run import ReportedRun
from svite_scale.report.section import Runs, Section, of_run, run_label
from svite_scale.sparsity.block_grid import SINGLE


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
    notes = [] if run.is_finished or run.total_steps is None else [f"of {run.total_steps:,}"]
    if (epoch := run.last("epoch")) is not None:
        notes.append(f"epoch {epoch:.4g} of {run.config.train.epochs}")
    if run.is_finished:
        notes.append(numbers.duration(run.summary["seconds"]))
    yield KeyNumber("Steps", f"{run.step:,}", ", ".join(notes))


def _sizes(run: ReportedRun) -> Iterator[KeyNumber]:
    cost = run.cost
    fraction = cost.params_active / cost.params_dense
    of = f"of {numbers.count(cost.params_dense)}"
    yield KeyNumber("Active parameters", numbers.count(cost.params_active), of, fraction)
    macs, of = numbers.count(cost.sparse_macs), f"of {numbers.count(cost.dense_macs)}, forward"
    yield KeyNumber("MACs of an image", macs, of, cost.sparse_macs / cost.dense_macs)
    of = f"of the dense ones, on {cost.device_type}"
    yield KeyNumber("MACs multiplied", numbers.count(cost.multiplied_macs), of, cost.multiplied_macs / cost.dense_macs)
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
        note = "" if step is None else f"{numbers.duration(step)} a step"
        yield KeyNumber("Images per second", numbers.plain(round(speed)), note)
    if (wait := typical("data_wait")) is not None:
        yield KeyNumber("Waiting for data", numbers.percent(wait), "of the step")
    if (flops := typical("flops_per_second")) is not None:
        dense = typical("dense_flops_per_second")
        note = "" if dense is None else f"dense needs {numbers.scaled(dense, 'FLOP/s')}"
        yield KeyNumber("Achieved", numbers.scaled(flops, "FLOP/s"), note)
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
    """Returns what was trained, with the model card; for several runs, how they compare."""
    if len(runs) > 1:
        return _comparison(runs)
    (run,) = runs
    facts = _list(_facts(run), "card facts")
    if run.saved is None:
        return Section("Summary", facts)
    tables = run_tables(run.saved, run.model, run.cost)
    card = [tag("div", tag("h3", title), _list(rows, "narrow facts")) for title, rows in tables.items()]
    folded = tag("details", tag("summary", "Model card"), tag("div", *card, class_="tables"))
    return Section("Summary", join(facts, folded), card_summary(run.config, run.cost))


def _comparison(runs: Runs) -> Section:
    """Returns the key numbers of several runs side by side, and the options that differ."""
    head = ["", *(run_label(runs, run) for run in runs)]
    found = [{number.label: number for number in key_numbers(run)} for run in runs]
    labels = dict.fromkeys(label for each in found for label in each)
    rows = [[label, *(_cell(each.get(label)) for each in found)] for label in labels]
    parts = [tag("div", table(head, rows), class_="card")]
    options = [flatten_config(to_dict(run.config)) for run in runs]
    differing = [key for key in options[0] if key != "run_dir" and len({str(each[key]) for each in options}) > 1]
    if differing:
        rows = [[key, *(_as_in_yaml(each[key]) for each in options)] for key in differing]
        parts += [tag("h4", "Options that differ"), tag("div", table(head, rows), class_="card options")]
    return Section("Summary", join(*parts))


def _as_in_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _list(rows: Mapping[str, str], kind: str) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows.items()), class_=kind)


def _cell(number: KeyNumber | None) -> str:
    if number is None:
        return "–"
    return number.value if number.fraction is None else f"{number.value} ({numbers.percent(number.fraction)})"


def _facts(run: ReportedRun) -> dict[str, str]:
    """Returns what was trained, and how."""
    config, train, optimizer = run.config, run.config.train, run.config.optimizer
    engine = [config.parallel.engine]
    if run.world_size is not None:
        engine.append("1 rank" if run.world_size == 1 else f"{run.world_size} ranks")
    engine += [train.precision, *([run.summary["device"]] if run.summary else [])]
    return {
        "Model": f"{config.model.name}, {config.model.image_size} px, {config.model.num_classes} classes",
        "Sparsity": sparsity_of(run),
        "Engine": ", ".join(engine),
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
    if sparsity.block != SINGLE:
        parts.append("blocks of {} x {}".format(*sparsity.block))
    parts += [
        f"{numbers.percent(kept)} of the {unit}"
        for unit, kept in (("heads", sparsity.structured.heads), ("neurons", sparsity.structured.neurons))
        if kept < 1
    ]
    if sparsity.tokens.training_keep is not None:
        parts.append(f"{numbers.percent(sparsity.tokens.training_keep)} of the patches in training")
    elif (tokens := run.last("tokens")) is not None:
        parts.append(f"{tokens:.0f} tokens pass")
    return ", ".join(parts)


def configuration(runs: Runs) -> Section:
    """Returns the resolved configs, folded away."""
    folded = [
        tag("details", tag("summary", f"{of_run(runs, run)}config.yaml"), tag("pre", to_yaml(run.config))) for run in runs
    ]
    return Section("Configuration", join(*folded))
