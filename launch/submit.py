"""Submits a training run to Slurm: ``python launch/submit.py --nodes 4 --gpus-per-node 8 --config
configs/deit_base_s70.yaml data.train=...``. Submitted again, the run resumes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("torchrun", "deepspeed", "srun")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, type=Path, help="YAML file; see configs/")
    parser.add_argument("--nodes", required=True, metavar="N", help="number of nodes, or MIN-MAX to take what there is")
    parser.add_argument("--gpus-per-node", required=True, type=int, metavar="N", help="one rank trains on each")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0], help=f"default: {LAUNCHERS[0]}")
    parser.add_argument("--time", metavar="LIMIT", help="such as 24:00:00; default: the script's")
    parser.add_argument(
        "--warn-before", type=int, metavar="SECONDS", help="time to save before the limit; default: the script's"
    )
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="print the script, and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="replaces a value of the config file")
    return parser.parse_intermixed_args()


def main() -> int:
    given = arguments()
    from svite_scale.train import submit  # takes seconds to import, and --help needn't wait for it

    return submit.main(given, ROOT)


if __name__ == "__main__":
    sys.exit(main())
