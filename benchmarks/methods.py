"""Test accuracy by method on 5,000 real MNIST digits: mean and spread over seeds.

    python benchmarks/methods.py [--density 0.1] [--seeds 0 1 2] [--methods svite set static dense] [--set key=value ...]

Each run is ``configs/quickstart.yaml`` on one process and one thread, two runs at a time; a ``key=value`` replaces a value of
that file in every run. A seed fixes the weights, the masks, the order of the data and its augmentation; all methods
of a seed share them. Shards are made by ``make quickstart``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also where this is run as a script

from benchmarks.machine import describe_machine
from svite_scale.sparsity.methods import METHODS

ROOT = Path(__file__).parents[1]
PARALLEL_RUNS = 2


def accuracy(method: str, seed: int, density: float, overrides: list[str], folder: Path) -> float:
    """Test accuracy of one run, in percent."""
    run_dir = folder / f"{method}-{seed}"
    command = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml", f"run_dir={run_dir}", f"seed={seed}"]
    command += [f"sparsity.method={method}", f"sparsity.density={density}", "parallel.backend=single", "tracking.mlflow=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *overrides], cwd=ROOT, env=environment, check=True, capture_output=True)
    result: float = json.loads((run_dir / "summary.json").read_text())["eval_accuracy"]
    print(f"{method} seed {seed}: {100 * result:.2f}%", file=sys.stderr, flush=True)
    return 100 * result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["svite", "set", "static", "dense"])
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"density {arguments.density}, seeds {arguments.seeds} {' '.join(arguments.overrides)}")
    runs = list(product(arguments.methods, arguments.seeds))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        results = pool.map(lambda run: accuracy(*run, arguments.density, arguments.overrides, Path(folder)), runs)
        found = dict(zip(runs, results, strict=True))
    print(f"\n{'method':8} {'mean':>6} {'std':>5}  {'each seed':24} better than static, by seed")
    for method in arguments.methods:
        accuracies = [found[method, seed] for seed in arguments.seeds]
        gains = (
            [found[method, seed] - found["static", seed] for seed in arguments.seeds] if "static" in arguments.methods else []
        )
        each = " ".join(f"{value:6.2f}" for value in accuracies)
        print(
            f"{method:8} {statistics.mean(accuracies):6.2f} {statistics.stdev(accuracies):5.2f}  {each:24} "
            + " ".join(f"{gain:+.2f}" for gain in gains)
        )


if __name__ == "__main__":
    main()
