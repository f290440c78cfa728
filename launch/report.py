"""Reports a run, finished or not: ``python launch/report.py --run runs/quickstart`` writes one HTML page that holds all of it.
Several ``--run`` are compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svite_scale.errors import SviteScaleError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--run", required=True, type=Path, action="append", metavar="DIR", help="run directory; again for each run to compare"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="such as step-00001240; default: the newest")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="evaluation images to show; default: 8")
    parser.add_argument("--val", metavar="SHARDS", help="where to take them from; default: data.val of the run's config")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to; default: report/, or comparison/, in the first run's directory",
    )
    return parser.parse_args()


def main() -> int:
    given = arguments()
    # Takes seconds to import, and --help needn't wait for it.
    from svite_scale.report.page import write_report

    out = given.out or given.run[0] / ("report" if len(given.run) == 1 else "comparison")
    try:
        print(write_report(given.run, out, checkpoint=given.checkpoint, val=given.val, num_images=given.images))
    except SviteScaleError as error:
        print(f"report error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
