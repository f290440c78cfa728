"""Evaluates a run's checkpoint, or exported weights, on every evaluation sample exactly once: on one process, or on any number
of ranks under torchrun, deepspeed, accelerate or srun.

python launch/evaluate.py --run runs/quickstart
torchrun --nproc-per-node 2 -- launch/evaluate.py --run runs/quickstart --ema data.val='shards/other/val-*.tar'

(Without the two dashes, torchrun takes --run for one of its own options.)
It prints the results and writes them into a folder: evaluation.json, per_class.json, per_class.csv and confusion.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--checkpoint", metavar="NAME", help="such as step-00001240; default: the newest")
    parser.add_argument("--ema", action="store_true", help="evaluate the moving average of the weights")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write to; default: evaluation/CHECKPOINT in the run directory"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="replaces a value of the run's config: data.*, train.eval_batch_size or train.precision",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK says the same
    return parser.parse_intermixed_args()


def main() -> None:
    given = arguments()
    # These import torch, and --help needn't wait for it.
    from svite_scale.evaluation import command
    from svite_scale.runtime.ending import run_process

    run_process(lambda: command.main(given))


if __name__ == "__main__":
    main()
