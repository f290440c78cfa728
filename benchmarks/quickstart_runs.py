"""Runs of ``configs/quickstart.yaml`` with other values, over seeds, for the accuracy benchmarks.

Each run is one process with one thread; two runs train at a time. A seed fixes the weights, the masks, the order of the data
and its augmentation. ``make quickstart`` makes the shards.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARALLEL_RUNS = 2


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        accuracy: on the test digits, in percent.
        metrics: the newest value of each metric.
    """

    accuracy: float
    metrics: Mapping[str, float]


def run(name: str, seed: int, overrides: Sequence[str], folder: Path) -> Result:
    """Trains one run from start to end."""
    run_dir = folder / f"{name.replace('/', '-')}-{seed}"
    command = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml", f"run_dir={run_dir}", f"seed={seed}"]
    command += ["parallel.backend=single", "tracking.mlflow=false", *overrides]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    accuracy = 100 * json.loads((run_dir / "summary.json").read_text())["eval_accuracy"]
    print(f"{name} seed {seed}: {accuracy:.2f}%", file=sys.stderr, flush=True)
    metrics: dict[str, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        metrics |= json.loads(line)
    return Result(accuracy, metrics)


def run_all(rows: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> dict[str, list[Result]]:
    """Returns the results of each row, one per seed. ``rows`` holds the overrides by the row's name."""
    runs = list(product(rows, seeds))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        results = pool.map(lambda each: run(each[0], each[1], rows[each[0]], Path(folder)), runs)
        found = dict(zip(runs, results, strict=True))
    return {name: [found[name, seed] for seed in seeds] for name in rows}


def mean_and_spread(results: Sequence[Result]) -> str:
    """Returns ``mean  standard deviation  each seed``, in percent."""
    accuracies = [result.accuracy for result in results]
    spread = f"{statistics.stdev(accuracies):5.2f}" if len(accuracies) > 1 else "    -"
    return f"{statistics.mean(accuracies):6.2f} {spread}  {' '.join(f'{value:6.2f}' for value in accuracies)}"
