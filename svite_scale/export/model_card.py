"""The model card of an export, ``README.md``: what the model is, from the files of its run."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from timm.models import VisionTransformer
from torch import nn

from svite_scale.checkpoint.load import read_run_state
from svite_scale.config.load import flatten_config, to_dict
from svite_scale.config.plain_yaml import dump
from svite_scale.config.schema import Config
from svite_scale.cost.flops import ModelCost, count_flops
from svite_scale.data.remote.fetch import PIPE
from svite_scale.errors import ExportError
from svite_scale.export.form import Export, Notes
from svite_scale.export.formats import OnnxOptions
from svite_scale.models.token_selector import token_selectors
from svite_scale.saved_run import SavedRun
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.options import FROM_WEIGHTS
from svite_scale.tracking.tracker import METRICS

CARD = "README.md"

OF_ONE_MACHINE = re.compile(
    r"run_dir|model\.weights|sparsity\.masks|distillation\.checkpoint|data\.(train|val|cache_\w+|workers)|tracking\..*"
)
"""Config keys whose values aren't shown: paths, and what one machine needs."""

LIMITS = (
    "The model knows the classes that it was trained on, and says one of them for every image.",
    "The accuracy is that on the evaluation images above. Robustness to other images, and bias, weren't measured.",
)


@dataclass(frozen=True)
class Accuracy:
    """The last evaluation of a checkpoint's model.

    Attributes:
        top1: accuracy, 0 to 1.
        values: all numbers, by what they are called on the card.
        data: evaluation shards, as :func:`_shards` names them.
        source: who measured them, and when.
    """

    top1: float
    values: dict[str, str]
    data: str
    source: str


def write_card(export: Export, notes: Notes, folder: Path) -> None:
    """Writes the model card of an exported folder."""
    (folder / CARD).write_text(card_text(export, notes), encoding="utf-8")


def card_text(export: Export, notes: Notes) -> str:
    """Returns the model card as Markdown, with the YAML at its top that model hubs read."""
    run, description = export.run, export.description
    cost = count_flops(export.model, run.config.model.image_size)
    tables = run_tables(run, export.model, cost, ema=description.origin.ema)
    if notes.facts:
        tables[f"In the form {description.form}"] = dict(notes.facts)
    sections = [
        f"# {_plain(description.origin.run)}",
        _plain(summary(run.config, cost)),
        f"## Use\n\n{notes.usage.strip()}" + ("\n\n`FOLDER` is the path of this folder." if "FOLDER" in notes.usage else ""),
        *(f"## {title}\n\n{_table(rows)}" for title, rows in tables.items()),
        f"## Commands\n\n{_commands(export)}",
        f"## Licence\n\n{_licence(description.license)}",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*LIMITS, *notes.limits)),
    ]
    return f"---\n{dump(_front_matter(export, notes))}---\n\n" + "\n\n".join(sections) + "\n"


def summary(config: Config, cost: ModelCost) -> str:
    """Returns a few sentences that say what a model is, as plain text."""
    return (
        f"An image classifier: {config.model.name} with {config.model.num_classes:,} classes, for images of "
        f"{config.model.image_size} px, trained by svite_scale. {cost.params_active / cost.params_dense:.1%} of the parameters "
        f"are active. An image needs {1 - cost.saving:.1%} of the dense model's multiply-accumulates, and svite_scale's layers "
        f"take {cost.multiplied_macs / cost.dense_macs:.1%} of them on {cost.device_type}."
    )


def run_tables(run: SavedRun, model: nn.Module, cost: ModelCost, *, ema: bool = False) -> dict[str, dict[str, str]]:
    """Returns what a card says of a run, by section and name, in order. Values are plain text.

    Args:
        run: up to a checkpoint.
        model: of that checkpoint, from :func:`~svite_scale.saved_run.load_model`.
        cost: of the same model.
        ema: whether it is the moving average.

    Raises:
        CheckpointError: the checkpoint's state can't be read.
    """
    accuracy = last_accuracy(run, ema=ema)
    return {
        "Model": _model(run, model, ema),
        "Density": densities(model) or {"all layers": "dense"},
        "Cost": _cost(cost),
        "Accuracy": {**accuracy.values, "data": accuracy.data, "measured": accuracy.source} if accuracy else {"measured": "no"},
        "Training": _training(run),
        "Data": _data(run.config),
        "Versions": {name: str(version) for name, version in read_run_state(run.checkpoint)["versions"].items()},
    }


def densities(model: nn.Module) -> dict[str, str]:
    """Returns the density of each kind of sparse layer, such as all ``blocks.*.attn.qkv``; empty if no layer is sparse."""
    kinds: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, layer in sparse_layers(model).items():
        kind = re.sub(r"\b\d+\b", "*", name)
        kinds[kind].append((layer.num_active, layer.shape.numel(), layer.unit))
    rows = {}
    for kind, layers in kinds.items():
        active, total = sum(layer[0] for layer in layers), sum(layer[1] for layer in layers)
        rows[kind] = f"{active / total:.4f}: {active:,} of {total:,} {layers[0][2]} in {_count(len(layers), 'layer')}"
    return rows


def last_accuracy(run: SavedRun, *, ema: bool = False) -> Accuracy | None:
    """Returns the accuracy that ``launch/evaluate.py`` measured, or else that of the run's own last evaluation; None without.

    An evaluation with other labels than those of the data is left out.

    Raises:
        RunError, ExportError: ``evaluation.json``, or the line of ``metrics.jsonl``, is damaged.
    """
    evaluation = run.evaluation(ema=ema)
    path = run.evaluation_folder(ema=ema) / "evaluation.json"
    prefix = "eval_ema_" if ema else "eval_"
    line = next((line for line in reversed(run.metrics) if f"{prefix}accuracy" in line), None)
    try:
        if evaluation and evaluation["labels"] is None and evaluation["label_map"] is None:
            shards = _shards(str(evaluation["data"]))
            return Accuracy(evaluation["accuracy"], _accuracies(evaluation), shards, "by launch/evaluate.py")
        if line is None:
            return None
        path = run.run_dir / METRICS
        found = {name.removeprefix(prefix): value for name, value in line.items()}
        source = f"by the run itself, after step {line['step']:,}"
        return Accuracy(found["accuracy"], _accuracies(found), _shards(run.config.data.val), source)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(f"{path} is damaged ({error!r}); evaluate the checkpoint again, or remove it") from error


def _accuracies(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns the numbers of an evaluation as text, by what they are called on the card."""
    texts = {
        "top-1": ("accuracy", "{:.2%}"),
        "top-5": ("top5", "{:.2%}"),
        "loss": ("loss", "{:.4f}"),
        "calibration error": ("calibration_error", "{:.4f}"),
        "images": ("samples", "{:,}"),
    }
    return {
        label: "not finite" if found[name] is None else text.format(found[name])
        for label, (name, text) in texts.items()
        if name in found
    }


def _model(run: SavedRun, model: nn.Module, ema: bool) -> dict[str, str]:
    config = run.config.model
    sizes = {name: getattr(config, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    rows = {
        "architecture": f"{config.name} of timm",
        "sizes": ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None) or "its own",
        "classes": f"{config.num_classes:,}",
        "input": f"{config.in_channels} x {config.image_size} x {config.image_size}",
        "weights": f"{'moving average' if ema else 'as trained'}, {run.checkpoint.name}",
    }
    if selectors := token_selectors(model):
        vit = cast(VisionTransformer, model)
        passing = "".join(f", then {selector.num_tokens:,}" for selector in selectors)
        rows["tokens"] = f"{vit.patch_embed.num_patches + vit.num_prefix_tokens:,}{passing}"
    return rows


def _cost(cost: ModelCost) -> dict[str, str]:
    return {
        "parameters": f"{cost.params_active:,} active of {cost.params_dense:,} ({cost.params_active / cost.params_dense:.1%})",
        "multiply-accumulates of an image": f"{cost.sparse_macs:,} of {cost.dense_macs:,} ({1 - cost.saving:.1%})",
        f"multiplied by svite_scale on {cost.device_type}": f"{cost.multiplied_macs:,} of {cost.dense_macs:,} "
        f"({cost.multiplied_macs / cost.dense_macs:.1%})",
    }


def _training(run: SavedRun) -> dict[str, str]:
    config = run.config
    rows = {
        "start": "random weights" if config.model.weights is None else Path(config.model.weights).name,
        "method": str(config.sparsity.method),
        "steps": f"{run.step:,}, of {config.train.global_batch_size:,} images each",
        "epochs": f"{config.train.epochs:,} planned",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}, weight decay "
        f"{config.optimizer.weight_decay:g}",
        "precision": config.train.precision,
        "engine": config.parallel.backend,
        "seed": str(config.seed),
    }
    if config.distillation.teacher is not None:
        rows["teacher"] = config.distillation.teacher
    return rows


def _data(config: Config) -> dict[str, str]:
    data = config.data
    return {
        "training shards": _shards(data.train),
        "evaluation shards": _shards(data.val),
        "augmentation": data.augment.recipe,
        "normalisation": f"mean {list(data.mean)}, std {list(data.std)}, of pixels in 0..1",
        "evaluation crop": f"short side to {config.model.image_size} / {data.eval_crop:g} px (bicubic), then the centre",
    }


def _shards(pattern: str) -> str:
    """Returns the last two parts of the name of shards, which say what data it is; not where on a machine it was."""
    return "the output of a command" if pattern.startswith(PIPE) else "/".join(pattern.rstrip("/").split("/")[-2:])


def _commands(export: Export) -> str:
    origin, description = export.description.origin, export.description
    command = ["python", "launch/export.py", "--run", origin.run, "--checkpoint", origin.checkpoint]
    command += ["--format", description.form, *_onnx_options(export.onnx), *(["--ema"] if origin.ema else [])]
    command += [*(["--license", description.license] if description.license else []), "--out", "FOLDER"]
    values, hidden = recipe(export.run.config)
    return (
        "The run was trained by `launch/train.py --config recipe.yaml`, with this `recipe.yaml`:\n\n"
        f"```yaml\n{dump(values)}```\n\n"
        f"and with values for its machine: {', '.join(f'`{name}`' for name in hidden)}. All other keys had their defaults. The "
        f"model was exported by\n\n```\n{' '.join(shlex.join(command).split())}\n```"
    )


def _onnx_options(options: OnnxOptions) -> list[str]:
    given = {"--onnx-form": options.form, "--int8": options.int8}
    return [text for name, value in given.items() if value is not None for text in (name, str(value))]


def recipe(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of a config that aren't defaults, as nested dicts, and the names of those that only one machine needs,
    such as paths, which are left out.
    """
    defaults = flatten_config(to_dict(Config(run_dir="")))
    nested: dict[str, Any] = {}
    hidden = []
    for name, value in flatten_config(to_dict(config)).items():
        if value == defaults[name]:
            continue
        if OF_ONE_MACHINE.fullmatch(name) and value != FROM_WEIGHTS:
            hidden.append(name)
            continue
        *sections, key = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return nested, hidden


def _licence(license: str | None) -> str:
    return _plain(license) if license else "None was named when the model was exported (`--license`)."


def _front_matter(export: Export, notes: Notes) -> dict[str, Any]:
    run, description = export.run, export.description
    content: dict[str, Any] = {
        "library_name": notes.library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "sparsity", "svite_scale"],
    }
    if description.license:
        content["license"] = description.license
    if accuracy := last_accuracy(run, ema=description.origin.ema):
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": accuracy.data, "type": accuracy.data},
            "metrics": [{"type": "accuracy", "value": round(accuracy.top1, 6)}],
        }
        content["model-index"] = [{"name": description.origin.run, "results": [result]}]
    return content


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items())])


def _plain(text: str) -> str:
    """Returns text so that Markdown shows it as it is, on one line: a run may be somebody else's."""
    return re.sub(r"([\\`*_{}\[\]<>|~])", r"\\\1", " ".join(text.split()))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
