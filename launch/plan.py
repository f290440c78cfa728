"""Prints the costs of runs, one line each: ``python launch/plan.py --paper`` for the shipped DeiT configs beside the paper's
figures, ``python launch/plan.py FILE ...`` for any others. ``launch/train.py --dry-run`` plans one run in full.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svite_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--paper", action="store_true", help="all DeiT configs in configs/")
    what.add_argument("configs", nargs="*", type=Path, default=[], metavar="FILE", help="YAML files")
    arguments = parser.parse_args()
    from svite_scale.cost.paper_table import paper_table  # takes seconds to import, and --help needn't wait for it

    try:
        print(paper_table(sorted(CONFIGS.glob("deit_*.yaml")) if arguments.paper else arguments.configs))
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
