"""Every number of docs/accuracy.md: accuracy on glyphs over seeds, beside what a model costs.

    python launch/make_shards.py --source glyphs --out data/glyphs
    python launch/make_shards.py --source glyphs --canvas 42 --out data/glyphs42
    python benchmarks/evidence.py --tables weights tokens [--seeds 0 1 2]
    python benchmarks/evidence.py --write-page

Each run is ``launch/train.py`` in one process with one thread, two at a time. A seed fixes the weights, the masks and the order
of the data. A finished run is added to docs/evidence.json and isn't run again, so the same command goes on after an
interruption, and tables share runs. The page's tables and its picture are made from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a script

from benchmarks.evidence_tables import TABLES, Row, Table
from benchmarks.machine import describe_machine
from benchmarks.structure import Twin
from svite_scale.config.load import flatten_config, read_config, to_dict
from svite_scale.config.schema import Config
from svite_scale.cost.flops import count_flops
from svite_scale.cost.memory import bytes_per_rank, model_sizes
from svite_scale.evaluation.timing import alternate, ratio
from svite_scale.models.sparse import build_sparse
from svite_scale.report.patches import kept_patches
from svite_scale.saved_run import evaluation_images, load_model, read_run

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = ROOT / "docs" / "evidence.json", ROOT / "docs" / "accuracy.md", ROOT / "docs" / "accuracy.svg"
INK = 0.25
"""Brightness, 0 to 1, from which a pixel is part of a glyph."""

COLUMNS = ("multiplications", "with active weights", "time of a step", "state", "accuracy", "deviation", "each seed")

PICTURED = {"weights": "weights", "blocks": "blocks of weights", "units": "heads and neurons", "tokens": "tokens"}
"""The tables in the picture, with their titles."""

MARKERS = "sD^vPX*<>"

Key = tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        accuracy: on the test images, in percent.
        ever_active: by kind of unit, the fraction that was active at any time.
        ink_kept: fraction of the patches with ink that all token selectors let pass, over 1,000 test images; None without one.
    """

    accuracy: float
    ever_active: dict[str, float]
    ink_kept: float | None


def key_of(table: Table, row: Row, seed: int) -> Key:
    """Returns what was run: the config file, the values that differ from it, and the seed; so tables share runs."""
    usual, values = values_of(table.config), values_of(table.config, table.overrides(row))
    changed = sorted(f"{name}={json.dumps(value)}" for name, value in values.items() if value != usual[name])
    return (table.config, *changed, str(seed))


@cache
def values_of(config: str, overrides: tuple[str, ...] = ()) -> dict[str, object]:
    return flatten_config(to_dict(read_config(ROOT / config, overrides)))


class Results:
    """The runs and times of docs/evidence.json, by what was run."""

    def __init__(self) -> None:
        saved: dict[str, Any] = {"machine": describe_machine(), "runs": [], "times": {}}
        if RESULTS.exists():
            saved = json.loads(RESULTS.read_text())
        self.machine: str = saved["machine"]
        self.times: dict[str, float] = saved["times"]
        self.runs: dict[Key, Result] = {tuple(run.pop("key")): Result(**run) for run in saved["runs"]}

    def save(self) -> None:
        lines = ",\n".join(json.dumps({"key": key} | asdict(run)) for key, run in sorted(self.runs.items()))
        times = ",\n".join(f"{json.dumps(name)}: {json.dumps(ratios)}" for name, ratios in sorted(self.times.items()))
        text = f'{{"machine": {json.dumps(self.machine)},\n"runs": [\n{lines}\n],\n"times": {{\n{times}\n}}}}\n'
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(RESULTS)

    def of(self, table: Table, row: Row) -> list[Result]:
        """Returns the runs of a row, by seed."""
        return [self.runs[key] for seed in range(10) if (key := key_of(table, row, seed)) in self.runs]


def train(table: Table, row: Row, seed: int, shards: Path) -> Result:
    """Trains one run from start to end, and looks at its model."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "launch/train.py", "--config", table.config, f"run_dir={run_dir}", f"seed={seed}"]
        command += table.overrides(row)
        command += [f"data.{split}={shards / table.shards}/{split}-*.tar" for split in ("train", "val")]
        command += ["parallel.backend=single", "tracking.mlflow=false"]
        # The fused attention's backward in bfloat16 takes more than half of a step on a CPU.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        summary = json.loads((run_dir / "summary.json").read_text())
        metrics: dict[str, float] = {}
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            metrics |= json.loads(line)
        kinds = {"weights": "ever_active"} | {kind: f"{kind}/ever_active" for kind in ("blocks", "heads", "neurons")}
        return Result(
            round(100 * summary["eval_accuracy"], 2),
            {kind: round(metrics[name], 4) for kind, name in kinds.items() if name in metrics},
            ink_kept(run_dir),
        )


def ink_kept(run_dir: Path) -> float | None:
    """Returns the fraction of the patches with ink that pass all token selectors of a run's model; None if it has none."""
    run = read_run(run_dir)
    if run.config.sparsity.tokens.keep is None:
        return None
    images = evaluation_images(run.config, 1000)
    kept = kept_patches(load_model(run), images.inputs)[-1]
    size = run.config.model.patch_size
    assert size is not None
    patches = images.pixels.float().amax(1).unfold(1, size, size).unfold(2, size, size).amax((-1, -2)) / 255
    inked = patches.flatten(1) > INK
    return round(int((inked & kept).sum()) / int(inked.sum()), 4)


def run_missing(names: Iterable[str], labels: Sequence[str], seeds: Sequence[int], shards: Path, processes: int) -> None:
    """Trains the runs of some tables that have no result yet, of the rows of these labels, or of all if there are none."""
    results = Results()
    wanted: dict[Key, tuple[Table, Row, int]] = {}
    for seed, name in product(seeds, names):
        table = TABLES[name]
        for row in (row for row in table.rows if row.label in labels or not labels):
            wanted[key_of(table, row, seed)] = (table, row, seed)
    missing = [run for key, run in wanted.items() if key not in results.runs]
    with ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(train, *run, shards): run for run in missing}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                table, row, seed = futures[future]
                results.runs[key_of(table, row, seed)] = result = future.result()
                results.save()
                print(
                    f"{done} of {len(missing)}: {row.label}, seed {seed}: {result.accuracy:.2f}%", file=sys.stderr, flush=True
                )
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, no other run begins


def config_of(table: Table, row: Row) -> Config:
    return read_config(ROOT / table.config, [*table.overrides(row), "run_dir=unused"])


class Cost:
    """What a model costs, from sizes alone.

    Attributes:
        macs: multiply-accumulates of one image's forward, as they are computed.
        active_macs: the same of the active weights alone.
        state: bytes of training state on one rank: weights, gradients, moments, masks, statistics.
    """

    def __init__(self, config: Config) -> None:
        model, _ = build_sparse(config.model, config.sparsity, config.seed)
        cost = count_flops(model, config.model.image_size, device="cpu")
        size, _ = model_sizes(model, cost)
        self.macs, self.active_macs = cost.multiplied_macs, cost.sparse_macs
        self.state = sum(bytes_per_rank(config.parallel, config.train.precision, 1, size).values())


def time_rows(names: Iterable[str], rounds: int) -> None:
    """Times a training step of each row beside one of its table's first row, in one process, and keeps the ratios."""
    torch.set_num_threads(1)
    results = Results()
    for name in names:
        table = TABLES[name]
        base = step_of(config_of(table, table.rows[0]))
        for row in table.rows[1:]:
            seconds = alternate({"row": step_of(config_of(table, row)), "base": base}, rounds)
            results.times[f"{name}: {row.label}"] = round(ratio(seconds["row"], seconds["base"]), 3)
            results.save()


def step_of(config: Config) -> Callable[[], None]:
    """Returns a function that takes one training step of a run's model, on random images, in fp32."""
    twin, model = Twin(config.sparsity, "cpu", config.model), config.model
    images = torch.randn(config.train.global_batch_size, model.in_channels, model.image_size, model.image_size)
    labels = torch.randint(model.num_classes, images.shape[:1])
    return lambda: twin.train(images, labels)


def markdown(name: str, results: Results) -> str:
    """Returns a table of the page: costs against the first row, accuracy over seeds."""
    table = TABLES[name]
    base = Cost(config_of(table, table.rows[0]))
    heads = ["", *COLUMNS, *table.columns]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table.rows:
        found = results.of(table, row)
        if not found:
            continue
        cost = Cost(config_of(table, row))
        time = results.times.get(f"{name}: {row.label}")
        accuracies = [run.accuracy for run in found]
        cells = [
            row.label,
            f"{cost.macs / base.macs:.2f}",
            f"{cost.active_macs / base.active_macs:.2f}",
            "1" if row is table.rows[0] else "-" if time is None else f"{time:.2f}",
            f"{cost.state / base.state:.2f}",
            f"**{statistics.mean(accuracies):.2f}**",
            f"{statistics.stdev(accuracies):.2f}" if len(found) > 1 else "-",
            " ".join(f"{accuracy:.2f}" for accuracy in accuracies),
            *(cell(found) for cell in table.columns.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(results: Results) -> None:
    """Writes the tables into the page, between their marks, and the picture beside it."""
    text = PAGE.read_text()
    for name in TABLES:
        text = replace_marked(text, name, markdown(name, results))
    PAGE.write_text(text)
    draw(results)


def replace_marked(text: str, name: str, content: str) -> str:
    """Returns a page with other lines between ``<!-- evidence: NAME -->`` and ``<!-- end -->``."""
    before, mark, rest = text.partition(f"<!-- evidence: {name} -->\n")
    if not mark:
        raise ValueError(f"the page has no place for the table {name}")
    _, end, after = rest.partition("<!-- end -->")
    return before + mark + content + "\n" + end + after


def draw(results: Results) -> None:
    """Draws accuracy against the multiply-accumulates with active weights: a line of dense widths, and a point for each row."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, name in zip(figure.subplots(2, 2).flat, PICTURED, strict=True):
        table = TABLES[name]
        points = [
            (row, Cost(config_of(table, row)).active_macs / 1e6, statistics.mean(run.accuracy for run in found))
            for row in table.rows
            if (found := results.of(table, row))
        ]
        widths: dict[float, float] = {}
        for _, macs, accuracy in (point for point in points if is_dense(point[0])):
            widths[macs] = max(accuracy, widths.get(macs, accuracy))  # of two learning rates, the better one
        axes.plot(*zip(*sorted(widths.items()), strict=True), "o-", color="0.4", label="dense, by width")
        for number, (row, macs, accuracy) in enumerate(point for point in points if not is_dense(point[0])):
            axes.plot(macs, accuracy, MARKERS[number % len(MARKERS)], label=row.label.replace("`", ""))
        axes.set(title=PICTURED[name], xlabel="million multiply-accumulates per image", ylabel="accuracy in percent")
        axes.set_xscale("log")
        axes.legend(fontsize="x-small")
    figure.savefig(PICTURE, metadata={"Date": None})


def is_dense(row: Row) -> bool:
    return not any(override.startswith("sparsity.") for override in row.overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[], help="train the runs that these lack")
    parser.add_argument("--rows", nargs="+", default=[], metavar="LABEL", help="only these rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shards", type=Path, default=Path("data"), help="folder of glyphs and glyphs42")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--times", nargs="+", choices=TABLES, default=[], help="time the steps of these")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write-page", action="store_true")
    arguments = parser.parse_args()
    run_missing(arguments.tables, arguments.rows, arguments.seeds, arguments.shards.absolute(), arguments.processes)
    time_rows(arguments.times, arguments.rounds)
    if arguments.write_page:
        write_page(Results())


if __name__ == "__main__":
    main()
