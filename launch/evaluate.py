"""Evaluates a run's checkpoint, or exported weights, on every evaluation sample exactly once: on one process, or on any number
of ranks under torchrun, deepspeed, accelerate or srun.

python launch/evaluate.py --run runs/quickstart
torchrun --nproc-per-node 2 -- launch/evaluate.py --run runs/quickstart data.val='shards/other/val-*.tar'
python launch/evaluate.py --weights exported/quickstart data.val='data/mnist5k/val-*.tar'
python launch/evaluate.py --weights deit_small.pth --model deit_small_patch16_224 data.val='shards/imagenet/val-*.tar'

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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="DIR", help="run directory")
    what.add_argument("--weights", type=Path, metavar="PATH", help="exported folder, or a file in it; or a state dict")
    parser.add_argument("--checkpoint", metavar="NAME", help="of the run, such as step-00001240; default: the newest")
    parser.add_argument("--ema", action="store_true", help="evaluate the moving average of the run's weights")
    of_timm = parser.add_mutually_exclusive_group()
    of_timm.add_argument("--model", metavar="NAME", help="the weights are a .safetensors or .pth of this timm model")
    of_timm.add_argument("--config", metavar="FILE", help="the same of the dense model in this config")
    parser.add_argument("--trust", action="store_true", help="read weights of the form pt2, whose files can run code")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="accepted labels by sample, as ImageNet-ReaL's real.json")
    parser.add_argument(
        "--label-map", type=Path, metavar="FILE", help="labels of the model's classes, as timm's imagenet_r_indices.txt"
    )
    parser.add_argument(
        "--throughput",
        nargs="*",
        type=int,
        metavar="BATCH",
        help="evaluate nothing, but time inference with these batch sizes (default: 1 32) beside that of the dense model",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to; default: evaluation/CHECKPOINT in the run directory, with other labels or options "
        "evaluation/CHECKPOINT-other, with --weights evaluation",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="replaces a value of the config: data.*, train.eval_batch_size or train.precision",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK says the same
    given = parser.parse_intermixed_args()
    if given.weights is not None and (given.checkpoint is not None or given.ema):
        parser.error("--checkpoint and --ema are for --run")
    if given.weights is None and (given.model or given.config or given.trust):
        parser.error("--model, --config and --trust are for --weights")
    return given


def main() -> None:
    given = arguments()
    # These import torch, and --help needn't wait for it.
    from svite_scale.evaluation import command
    from svite_scale.runtime.ending import run_process

    run_process(lambda: command.main(given))


if __name__ == "__main__":
    main()
