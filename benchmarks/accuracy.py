"""Test accuracy of every kind of sparsity on 5,000 real MNIST digits, in the same number of epochs: mean and spread over seeds.

    python benchmarks/accuracy.py [--seeds 0 1 2] [--rows ROW ...] [--set key=value ...]

Each run is one of ``benchmarks/quickstart_runs.py``; a ``key=value`` replaces a value of the config in every run. A second
table has the fraction of all heads, and of all neurons, that were ever active, for each run that packs them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a script

from benchmarks.machine import describe_machine
from benchmarks.quickstart_runs import Result, mean_and_spread, run_all

DENSE = "sparsity.density=1.0"
UNITS = [DENSE, "sparsity.structured.heads=0.6", "sparsity.structured.neurons=0.6"]
ROWS = {
    "dense": [DENSE],
    "weights 50%": ["sparsity.density=0.5"],
    "weights 70%": ["sparsity.density=0.3"],
    "weights 90%": ["sparsity.density=0.1"],
    "heads and neurons 40%": UNITS,
    "heads and neurons 40%, paper": [*UNITS, "sparsity.structured.grow=paper"],
    "tokens 90%": [DENSE, "sparsity.tokens.keep=0.9"],
    "tokens 70%": [DENSE, "sparsity.tokens.keep=0.7"],
    "tokens 50%": [DENSE, "sparsity.tokens.keep=0.5"],
    "tokens 95%, weights 50%": ["sparsity.density=0.5", "sparsity.tokens.keep=0.95"],
}
"""The overrides of each row, by its name: the sparsity of weights, heads and neurons, and the tokens that are kept."""


def ever_active(results: Sequence[Result], unit: str) -> str:
    """Returns the fraction of the units that were active at any time, mean and each seed, in percent."""
    fractions = [100 * result.metrics[f"{unit}/ever_active"] for result in results]
    return f"{statistics.mean(fractions):6.2f}  {' '.join(f'{fraction:6.2f}' for fraction in fractions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"seeds {arguments.seeds} {' '.join(arguments.overrides)}\n")
    results = run_all({name: [*ROWS[name], *arguments.overrides] for name in arguments.rows}, arguments.seeds)
    print(f"{'test accuracy':30} {'mean':>6} {'std':>5}  each seed")
    for name, found in results.items():
        print(f"{name:30} {mean_and_spread(found)}")
    print(f"\n{'ever active':30} {'':7} {'mean':>6}  each seed")
    for name, unit in product(results, ("heads", "neurons")):
        if f"{unit}/ever_active" in results[name][0].metrics:
            print(f"{name:30} {unit:7} {ever_active(results[name], unit)}")


if __name__ == "__main__":
    main()
