"""What a model costs beside its dense twin: bytes held and sent, and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from svite_scale.cost.flops import LayerCost
from svite_scale.cost.memory import ModelSize, bytes_per_rank, model_sizes
from svite_scale.cost.traffic import sent_per_step
from svite_scale.report import numbers
from svite_scale.report.charts import Format, bar, table
from svite_scale.report.html import Html, join, tag
from svite_scale.report.layers import split_name
from svite_scale.report.reported_run import ReportedRun
from svite_scale.report.section import Runs, Section, heading


class Twin(NamedTuple):
    """Bytes, or multiply-accumulates, of one kind: of the sparse model and of its dense twin."""

    kind: str
    sparse: int
    dense: int


def held(run: ReportedRun) -> list[Twin]:
    """Returns the bytes of training state that a rank holds; empty if the number of ranks isn't known."""
    config, ranks = run.config, run.world_size
    if ranks is None:
        return []
    ema = config.train.ema_decay is not None
    return _twins(run, lambda size: bytes_per_rank(config.parallel, config.train.precision, ranks, size, ema=ema))


def sent(run: ReportedRun) -> list[Twin]:
    """Returns the bytes that a rank sends in a step; empty if the number of ranks isn't known."""
    config, ranks = run.config, run.world_size
    if ranks is None:
        return []
    steps = config.train.accumulation_steps
    return _twins(
        run, lambda size: sent_per_step(config.parallel, config.train.precision, ranks, size, accumulation_steps=steps)
    )


def _twins(run: ReportedRun, count: Callable[[ModelSize], Mapping[str, int]]) -> list[Twin]:
    sparse, dense = (count(size) for size in model_sizes(run.model, run.cost))
    return [Twin(kind, sparse[kind], dense[kind]) for kind in sparse if sparse[kind] or dense[kind]]


def forward_macs(run: ReportedRun, count: Callable[[LayerCost], int]) -> list[Twin]:
    """Returns the multiply-accumulates of an image by kind of layer, such as ``attn.qkv``, of all blocks of the model together.

    Args:
        run: to count in.
        count: takes those of the sparse model from the cost of a layer.
    """
    totals: dict[str, Twin] = {}
    for layer in run.cost.layers:
        _, kind = split_name(layer.name)
        before = totals.get(kind, Twin(kind, 0, 0))
        totals[kind] = Twin(kind, before.sparse + count(layer), before.dense + layer.dense_macs)
    return list(totals.values())


HELD = "Training state of a rank", "Bytes that stay between steps, without activations."
SENT = "Sent by a rank in a step", "Bytes, if collectives go round a ring."
MACS = "Forward of an image", "Multiply-accumulates with active weights, of all blocks of the model together."
MULTIPLIED = "Multiplied for an image", "Those that the layers really take. They multiply inactive single weights as zeros."


def cost(runs: Runs) -> Section:
    """Returns what the model costs beside its dense twin: bytes held, bytes sent, multiply-accumulates."""
    parts = []
    for run in runs:
        tables = [
            _table(*HELD, held(run), numbers.size),
            _table(*SENT, sent(run), numbers.size),
            _table(*MACS, forward_macs(run, lambda layer: layer.sparse_macs), numbers.count),
            _table(*MULTIPLIED, forward_macs(run, lambda layer: layer.multiplied_macs), numbers.count),
        ]
        parts += [*heading(runs, run), tag("div", *(each for each in tables if each), class_="tables")]
    lead = "Computed from sizes. The dense twin is the same model with all weights, heads, neurons and tokens."
    return Section("Cost", join(*parts), lead)


def _table(title: str, note: str, kinds: Sequence[Twin], show: Format) -> Html | None:
    """Returns a card with a table of kinds and their sum; None without kinds."""
    if not kinds:
        return None
    total = Twin("all", sum(each.sparse for each in kinds), sum(each.dense for each in kinds))
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
