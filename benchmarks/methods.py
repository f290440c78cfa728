"""Test accuracy by method on 5,000 real MNIST digits: mean and spread over seeds.

    python benchmarks/methods.py [--density 0.1] [--seeds 0 1 2] [--methods svite set static dense] [--set key=value ...]

Each run is one of ``benchmarks/quickstart_runs.py``; a ``key=value`` replaces a value of the config in every run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a script

from benchmarks.machine import describe_machine
from benchmarks.quickstart_runs import mean_and_spread, run_all
from svite_scale.sparsity.topology.methods import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["svite", "set", "static", "dense"])
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"density {arguments.density}, seeds {arguments.seeds} {' '.join(arguments.overrides)}")
    shared = [f"sparsity.density={arguments.density}", *arguments.overrides]
    results = run_all({method: [f"sparsity.method={method}", *shared] for method in arguments.methods}, arguments.seeds)
    print(f"\n{'method':8} {'mean':>6} {'std':>5}  each seed; better than static, by seed")
    for method, found in results.items():
        pairs = zip(found, results.get("static", []), strict=False)
        gains = " ".join(f"{one.accuracy - other.accuracy:+.2f}" for one, other in pairs)
        print(f"{method:8} {mean_and_spread(found)}; {gains}")


if __name__ == "__main__":
    main()
