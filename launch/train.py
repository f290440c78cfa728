"""Trains the run that a config file describes: ``deepspeed launch/train.py --config configs/quickstart.yaml [key=value
...]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svite_scale.tracking.options import TrackingConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file; see configs/, and docs/models.md for its model.name")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="resume from the newest checkpoint of the run directory")
    resume.add_argument("--auto-resume", action="store_true", help="the same if there is a checkpoint, else start the run")
    parser.add_argument("--dry-run", action="store_true", help="print layers, costs and bytes per rank, and start nothing")
    parser.add_argument("--ranks", type=int, help="with --dry-run: world size to plan for, instead of the launched one")
    parser.add_argument(
        "--profile", metavar="STEPS", help="trace these optimizer steps, 12 or 10-12 say, into profile/ in the run directory"
    )
    parser.add_argument(
        "--log-dir", metavar="DIR", help="folder for each rank's output, rank-N.log, and exit status, rank-N.status"
    )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="replaces a value of the config file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK says the same
    return parser.parse_intermixed_args()


def train(given: argparse.Namespace) -> int:
    # It imports torch, and --help needn't wait for it.
    from svite_scale.train import command

    return command.main(given, publish_result)


def publish_result(run_dir: Path, tracking: TrackingConfig) -> None:
    # It imports what only a report and an export need, and training needn't wait for it.
    from svite_scale.publish import publish

    publish(run_dir, tracking)


def main() -> None:
    given = arguments()
    from svite_scale.runtime.ending import run_process
    from svite_scale.runtime.rank_log import run_logged

    run_process(lambda: run_logged(train, given))


if __name__ == "__main__":
    main()
